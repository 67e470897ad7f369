"""Initial weights: what loads, what is refused, and that nothing is downloaded by a job."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.video import r2plus1d_18

from jmt_dist.config import AudioOptions, VisualOptions
from jmt_dist.errors import UserError
from jmt_dist.model import weights
from jmt_dist.model.heads import AudioModel, VisualModel

PROGRAM = Path(__file__).parents[2] / "launch" / "fetch_weights.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `resnet18.pth` as torchvision publishes it (three channels, classifier), random weights."""
    path = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    torch.save(randomised(resnet18(weights=None)).state_dict(), path / "resnet18.pth")
    yield path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torchvision cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return weights.cache_folder()


def randomised(net: nn.Module) -> nn.Module:
    """Running statistics and affine parameters away from 0 and 1, so that a buffer left behind shows."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net


def audio(path: Path | str) -> AudioOptions:
    return AudioOptions(weights=str(path))


def refused(model: AudioModel | VisualModel, options: AudioOptions | VisualOptions, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        weights.load_initial(model, options)
    assert "\n" not in str(caught.value)


def test_torchvision_resnet_on_one_channel(folder: Path) -> None:
    model = AudioModel(AudioOptions(gru=False))
    head = [p.clone() for p in model.head.parameters()]
    assert "resnet18.pth" in weights.load_initial(model, audio(folder / "resnet18.pth"))
    theirs = resnet18(weights=None)
    theirs.load_state_dict(torch.load(folder / "resnet18.pth", weights_only=True))
    theirs.fc = nn.Identity()
    mel = torch.randn(2, 1, 64, 107)
    with torch.no_grad():  # averaging the kernels is feeding a third of the spectrogram to every channel
        wanted = theirs.eval()(mel.expand(2, 3, 64, 107) / 3)
        found = model.eval().backbone(mel.transpose(0, 1))[0]
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))
    assert all(torch.equal(a, b) for a, b in zip(head, model.head.parameters(), strict=True))


def test_torchvision_r2plus1d(tmp_path: Path) -> None:
    torch.manual_seed(4)
    theirs = randomised(r2plus1d_18(weights=None))
    torch.save(theirs.state_dict(), tmp_path / "video.pth")
    model = VisualModel(VisualOptions())
    weights.load_initial(model, VisualOptions(weights=str(tmp_path / "video.pth")))
    theirs.fc = nn.Identity()
    frames = torch.randn(1, 3, 8, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval().backbone(frames), theirs.eval()(frames))
    refused(VisualModel(VisualOptions(depth=10, weights="none")), VisualOptions(depth=10, weights=str(tmp_path / "video.pth")), "unknown")


def test_own_backbone_whole_model_safetensors_and_wrappers(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = AudioModel(AudioOptions())
    whole = source.state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in whole.items()}, "epoch": 3}, tmp_path / "wrapped.pt")
    torch.save(source.backbone.state_dict(), tmp_path / "backbone.pt")
    save_file(whole, tmp_path / "whole.safetensors")
    for name in ("wrapped.pt", "backbone.pt", "whole.safetensors"):
        model = AudioModel(AudioOptions())
        weights.load_initial(model, audio(tmp_path / name))
        for key, value in model.state_dict().items():
            expected = torch.equal(value, whole[key])
            assert expected or (name == "backbone.pt" and key.startswith("head.") and key.endswith("weight")), (name, key)
    refused(AudioModel(AudioOptions(gru=False)), audio(tmp_path / "whole.safetensors"), r"unknown `backbone\.gru\.")


def test_strictness(folder: Path, tmp_path: Path) -> None:
    good = torch.load(folder / "resnet18.pth", weights_only=True)
    model = AudioModel(AudioOptions())
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def attempt(state: object, words: str) -> None:
        torch.save(state, tmp_path / "bad.pth")
        refused(model, audio(tmp_path / "bad.pth"), words)

    attempt({k: v for k, v in good.items() if k != "layer2.0.conv1.weight"}, "lacks `layer2.0.conv1.weight`")
    attempt({**good, "layer9.weight": torch.zeros(1)}, "unknown `layer9.weight`")
    attempt({**good, "conv1.weight": torch.zeros(64, 2, 7, 7)}, r"`conv1.weight` is \[64, 2, 7, 7\] and should be \[64, 1, 7, 7\]")
    attempt({**good, "bn1.weight": torch.full((64,), float("nan"))}, "NaN or Inf in `bn1.weight`")
    attempt([1, 2], "does not hold a state dict")
    attempt({"model": 3}, "does not hold a state dict")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "short.pth").write_bytes((folder / "resnet18.pth").read_bytes()[:100_000])
    for name in ("text.pth", "text.safetensors", "short.pth"):
        refused(model, audio(tmp_path / name), "cannot be read as weights")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # a refused file changes nothing


def test_old_files_without_batch_counters_load(folder: Path, tmp_path: Path) -> None:
    good = torch.load(folder / "resnet18.pth", weights_only=True)
    torch.save({k: v for k, v in good.items() if not k.endswith("num_batches_tracked")}, tmp_path / "old.pth")
    model = AudioModel(AudioOptions())
    weights.load_initial(model, audio(tmp_path / "old.pth"))
    assert torch.equal(model.state_dict()["backbone.net.layer4.1.bn2.running_var"], good["layer4.1.bn2.running_var"])


def test_files_that_run_code_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    refused(AudioModel(AudioOptions()), audio(tmp_path / "evil.pth"), "cannot be read as weights")
    assert not (tmp_path / "ran").exists()


def test_names(cache: Path) -> None:
    refused(VisualModel(VisualOptions(weights="none")), VisualOptions(), r"kinetics400 are not in .*launch/fetch_weights\.py")
    refused(AudioModel(AudioOptions()), AudioOptions(), r"imagenet are not in .*launch/fetch_weights\.py")
    refused(VisualModel(VisualOptions(depth=10, weights="none")), VisualOptions(depth=10), "none for depth 10")
    refused(AudioModel(AudioOptions()), audio("kinetics400"), "fits another backbone than audio.backbone=resnet18. Take imagenet,")
    refused(VisualModel(VisualOptions(backbone="resnet50")), VisualOptions(backbone="resnet50"), "Take imagenet-resnet50, none or a file")
    refused(AudioModel(AudioOptions()), audio("no/such.pth"), "does not exist: no/such.pth")
    assert weights.load_initial(AudioModel(AudioOptions()), audio("none")) == "random weights"
    assert not cache.exists()


def test_cache_and_digest(cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (folder / "resnet18.pth").read_bytes()
    sha = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(weights.URLS, "imagenet", f"https://example.invalid/resnet18-{sha[:8]}.pth")
    with pytest.raises(UserError, match="fetch_weights"):
        weights.digest(AudioOptions())
    cache.mkdir(parents=True)
    (cache / f"resnet18-{sha[:8]}.pth").write_bytes(content)
    assert weights.digest(AudioOptions()) == f"sha256:{sha}" == weights.digest(audio(folder / "resnet18.pth"))
    assert weights.digest(audio("none")) == "none"
    model = AudioModel(AudioOptions())
    assert sha[:8] in weights.load_initial(model, AudioOptions())
    damaged = bytearray(content)
    damaged[len(damaged) // 2] ^= 1
    (cache / f"resnet18-{sha[:8]}.pth").write_bytes(damaged)
    refused(model, AudioOptions(), "is damaged")
    (folder / "copied").mkdir()
    (folder / "copied" / f"resnet18-{sha[:8]}.pth").write_bytes(damaged)
    refused(model, audio(folder / "copied" / f"resnet18-{sha[:8]}.pth"), "is damaged")


def test_the_digits_in_the_name_of_a_file_of_ones_own_may_be_a_date(folder: Path) -> None:
    own = folder / "audio-20260115.pth"
    own.write_bytes((folder / "resnet18.pth").read_bytes())
    assert "audio-20260115.pth" in weights.load_initial(AudioModel(AudioOptions()), audio(own))


def test_torchvisions_names_carry_their_digest() -> None:
    assert [weights.cached_path(name).name for name in ("kinetics400", "imagenet")] == [
        "r2plus1d_18-91a641e6.pth",
        "resnet18-f37072fd.pth",
    ]


def test_fetch(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / name).write_bytes(content)
    url = (tmp_path / "server" / name).as_uri()
    seen: list[tuple[int, int]] = []
    path = weights.fetch(url, tmp_path / "cache", lambda done, size: seen.append((done, size)))
    assert path.read_bytes() == content and seen[-1] == (3_000_000, 3_000_000) and len(seen) > 1
    (tmp_path / "server" / name).unlink()
    assert weights.fetch(url, tmp_path / "cache") == path  # there and whole: nothing is fetched
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match="could not be fetched"):
        weights.fetch(url, tmp_path / "cache")
    (tmp_path / "server" / name).write_bytes(b"something else")
    with pytest.raises(UserError, match="sha256 does not begin with"):
        weights.fetch(url, tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [name]  # no torn files


def test_program_fails_with_one_sentence(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    environment["PYTHONPATH"] = str(PROGRAM.parents[1])
    result = subprocess.run([sys.executable, PROGRAM, "weights=[imagenet]"], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and f"into {tmp_path}" in result.stdout
    assert len(result.stderr.splitlines()) == 1 and "could not be fetched" in result.stderr
