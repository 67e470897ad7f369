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
