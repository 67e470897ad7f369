"""How metrics are called in MLflow, so that a person who opens a run or compares some finds them (DESIGN section 12).

| where | names |
|---|---|
| a fold's run, the result | `val/ccc_valence`, `val/ccc_arousal`, `val/ccc_mean`; `val/smoothed/…` where windows are set |
| the same with one modality withheld | `val/without_audio/ccc_mean`, … |
| the same of its baselines | `baseline/visual/ccc_mean`, … |
| a fold's run, while it trains | `<stage>/train/loss`, `<stage>/train/lr`, `<stage>/val/ccc_mean`, `<stage>/val/best_ccc_mean`, … |
| the same, its pace (another in every run of the same recipe) | `<stage>/train/data_wait` (share of time), `<stage>/train/steps_per_s` |
| the same, where its model attends | `<stage>/attention/saturation_start`, `…_end`: share of weights below 0.05 or above 0.95 |
| a fold's run, the machine | `system/…` under MLflow's own names |
| the experiment's run | `official/ccc_mean`, `fold-1/ccc_mean`, … and over the folds 1 to 5 `folds_mean/…`, `folds_std/…` |

`<stage>` is `visual`, `audio` or `fusion/<model>-seed<n>`. `mean` is the mean of valence and arousal.
"""

from __future__ import annotations

from collections.abc import Iterable

TARGETS = ("valence", "arousal", "mean")
RESULT = "val"  # of a fold: the scores of its recipe's fusion model, mean over seeds
LOSS, RATE, UNLABELLED = "train/loss", "train/lr", "train/unlabelled_steps"  # of a stage
SATURATION = "attention/saturation"  # of a fusion stage, at its start and of its best weights
WAIT, SPEED = "train/data_wait", "train/steps_per_s"  # of a stage
SCORE, BEST = "val/ccc_mean", "val/best_ccc_mean"  # of a stage


def ccc(prefix: str, values: Iterable[float]) -> dict[str, float]:
    """`<prefix>/ccc_valence`, `_arousal` and `_mean` of (valence, arousal, their mean)."""
    return {f"{prefix}/ccc_{target}": float(value) for target, value in zip(TARGETS, values, strict=True)}
