"""Forward passes of the fusion models in NumPy float64, written from the paper and DESIGN alone: loops, no torch.

Parameters come as a dict of arrays under the model's own names, with linear weights [out, in].
"""

from __future__ import annotations

import numpy as np

from jmt_dist.config import JmtOptions

Parameters = dict[str, np.ndarray]


def linear(p: Parameters, name: str, x: np.ndarray) -> np.ndarray:
    bias = p.get(f"{name}.bias")
    y = x @ p[f"{name}.weight"].T
    return y if bias is None else y + bias


def norm(p: Parameters, name: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def attention(p: Parameters, name: str, options: JmtOptions, x: np.ndarray, s: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """One sample: x [L, 512], s [L, 512], valid [L]; one score at a time."""
    q, k, v = linear(p, f"{name}.query", x), linear(p, f"{name}.key", s), linear(p, f"{name}.value", s)
    size = q.shape[1] // options.heads
    result = np.zeros_like(q)
    for head in range(options.heads):
        part = slice(head * size, (head + 1) * size)
        for row in range(len(x)):
            weights = np.zeros(len(s))
            for column in np.flatnonzero(valid):
                a, b = (k[row], q[column]) if options.rows == "key" else (q[row], k[column])
                score = float(a[part] @ b[part])
                score = score / np.sqrt(size) if options.scale == "sqrt" else score
                score = score - np.log(valid.sum()) if options.bias == "log_length" else score
                weights[column] = score
            weights[valid] = (
                1 / (1 + np.exp(-weights[valid]))
                if options.score == "sigmoid"
                else np.exp(weights[valid] - weights[valid].max()) / np.exp(weights[valid] - weights[valid].max()).sum()
            )
            weights[~valid] = 0
            result[row, part] = weights @ v[:, part]
    return linear(p, f"{name}.out", result)


def encoder_layer(p: Parameters, name: str, options: JmtOptions, x: np.ndarray, valid: np.ndarray) -> np.ndarray:
    x = norm(p, f"{name}.norm1", x + attention(p, f"{name}.attention", options, x, x, valid))
    return norm(p, f"{name}.norm2", x + linear(p, f"{name}.outer", relu(linear(p, f"{name}.inner", x))))


def targets(p: Parameters, name: str, x: np.ndarray) -> np.ndarray:
    one = [linear(p, f"{name}.{t}.3", relu(linear(p, f"{name}.{t}.0", x))) for t in ("valence", "arousal")]
    return np.concatenate(one, -1)


def jmt(p: Parameters, options: JmtOptions, audio: np.ndarray, visual: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """One sample [L, 512] × 2 → [L, 2]."""
    streams = {"a": audio, "v": visual}
    if options.normalise:
        streams = {k: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for k, x in streams.items()}
    if options.joint:
        streams["j"] = linear(p, "reduce", np.concatenate((streams["a"], streams["v"]), -1))
    names = {"a": "audio", "v": "visual", "j": "joint"}
    for key in streams:
        for layer in range(options.layers):
            streams[key] = encoder_layer(p, f"encoders.{names[key]}.layers.{layer}", options, streams[key], valid)
    crossed = []
    for x, s in ("va", "vj", "jv", "ja", "av", "aj") if options.joint else ("va", "av"):
        crossed.append(attention(p, f"cross.{names[x]}_from_{names[s]}", options, streams[x], streams[s], valid))
    if options.head == "concat":
        return targets(p, "head.regress.targets", relu(linear(p, "head.regress.joint.0", np.concatenate(crossed, -1))))
    rows = []
    every = np.ones(len(crossed), dtype=bool)
    for clip in range(len(audio)):
        tokens = encoder_layer(p, "head.encoder", options, np.stack([c[clip] for c in crossed]), every)
        rows.append(attention(p, "head.attention", options, tokens, tokens, every)[-1])
    return targets(p, "head.targets", np.stack(rows))


def jca(p: Parameters, audio: np.ndarray, visual: np.ndarray) -> np.ndarray:
    """Praveen et al., 2022, with X as columns of clips (d × L), as the source writes it; one sample [8, 512] × 2."""
    joint = np.concatenate((audio, visual), -1).T  # [1024, L]
    attended = []
    for name, x in (("audio", audio.T), ("visual", visual.T)):  # [512, L]
        correlation = np.tanh(x @ p[f"{name}.joint"] @ joint.T / np.sqrt(1024))  # [512, 1024]
        hidden = relu(p[f"{name}.own"] @ x.T + p[f"{name}.correlation"] @ correlation.T)  # [32, 512]
        attended.append(p[f"{name}.back"].T @ hidden + x.T)
    return targets(p, "head.targets", relu(linear(p, "head.joint.0", np.concatenate(attended, -1))))


def lstm(p: Parameters, name: str, x: np.ndarray, layers: int) -> np.ndarray:
    """One sample [L, d] → [L, hidden]: Hochreiter and Schmidhuber's cell with a forget gate, gates in torch's order i, f, g, o."""
    for layer in range(layers):
        w, u = p[f"{name}.weight_ih_l{layer}"], p[f"{name}.weight_hh_l{layer}"]
        bias = p[f"{name}.bias_ih_l{layer}"] + p[f"{name}.bias_hh_l{layer}"]
        h = c = np.zeros(u.shape[1])
        outputs = []
        for row in x:
            i, f, g, o = np.split(w @ row + u @ h + bias, 4)
            i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
            c = f * c + i * np.tanh(g)
            h = o * np.tanh(c)
            outputs.append(h)
        x = np.stack(outputs)
    return x


def tcn(p: Parameters, name: str, x: np.ndarray) -> np.ndarray:
    """One sample [L, d] → [L, out]: two residual blocks, dilations 1 and 2, of two causal convolutions of three taps each."""

    def convolve(part: str, x: np.ndarray, dilation: int) -> np.ndarray:
        weight, rows = p[f"{part}.convolution.weight"], []
        for t in range(len(x)):
            row = p[f"{part}.convolution.bias"].copy()
            for tap in range(3):
                past = t - (2 - tap) * dilation
                if past >= 0:
                    row += weight[:, :, tap] @ x[past]
            rows.append(row)
        return relu(norm(p, f"{part}.norm", np.stack(rows)))

    for block, dilation in enumerate((1, 2)):
        beside = linear(p, f"{name}.shortcut", x) if block == 0 else x
        x = relu(beside + convolve(f"{name}.second.{block}", convolve(f"{name}.first.{block}", x, dilation), dilation))
    return x


def others(p: Parameters, model: str, audio: np.ndarray, visual: np.ndarray) -> np.ndarray:
    """The systems of one line each, as their docstrings write them; one sample [L, 512] × 2 → [L, 2]."""
    usual = JmtOptions(score="softmax", rows="query", scale="sqrt", heads=1 if model in ("audio", "visual") else 4)
    every, both = np.ones(len(audio), dtype=bool), np.concatenate((audio, visual), -1)
    if model in ("audio", "visual"):
        h = encoder_layer(p, "encoder.layers.0", usual, audio if model == "audio" else visual, every)
    elif model == "concat":
        h = relu(linear(p, "reduce", both))
    elif model == "lstm":
        h = lstm(p, "network", both, 2)
    elif model == "selfattn_lstm":
        h = lstm(p, "network", encoder_layer(p, "encoder", usual, linear(p, "reduce", both), every), 1)
    else:
        joined = np.concatenate((tcn(p, "audio", audio), tcn(p, "visual", visual)), -1)
        h = encoder_layer(p, "encoder.layers.0", usual, linear(p, "reduce", joined), every)
    return targets(p, "head.targets", relu(linear(p, "head.joint.0", h)))
