"""UnsafeBench's four attacks as guardkit runs them, and by foolbox as UnsafeBench's code calls it, on the same images.

    python benchmarks/foolbox_agreement.py [n_images=200] [batch_size=50]

A guard from the policy's texts on the embedded encoder, drawn scenes that it has right, every setting as published
(docs/robustness.md). Prints both robust accuracies of each attack and on how many images the two disagree. Needs
foolbox, which the extra `test` brings. Starts at random differ, so PGD and noise may disagree by chance.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import torch

from guardkit import GuardClassifier, Policy
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.heads import PromptHead
from guardkit.robustness.protocols import PROTOCOLS, RobustnessSettings
from guardkit.robustness.victim import Victim
from guardkit.scenes.content import SceneContent
from guardkit.scenes.world import ScenePool

EPSILON = 0.01


class Softmaxed(torch.nn.Module):
    """What UnsafeBench attacks: standardised pixels to a softmax over one logit for safe and one for unsafe."""

    def __init__(self, victim: Victim) -> None:
        super().__init__()
        self.victim = victim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.victim.on_standardised(x)
        return torch.stack([-logits / 2, logits / 2], dim=1).softmax(dim=1)


def main(n_images: int = 200, batch_size: int = 50) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import foolbox
    attacks = {
        "noise": foolbox.attacks.L2AdditiveGaussianNoiseAttack(),
        "fgsm": foolbox.attacks.LinfFastGradientAttack(),
        "pgd": foolbox.attacks.LinfProjectedGradientDescentAttack(steps=100),
        "deepfool": foolbox.attacks.LinfDeepFoolAttack(steps=100, candidates=2),
    }
    policy = Policy.load(Path(__file__).resolve().parents[1] / "conf/policy/scenes.yaml")
    encoder = OpenClipEncoder(None, "guardkit:scenes_clip", batch_size=batch_size)
    guard = GuardClassifier(PromptHead.build(encoder, policy), encoder, policy)
    victim = Victim(guard, batch_size=batch_size)
    pool = ScenePool("test", seed=7)
    images, labels = [], []
    for i in range(2 * n_images):
        image, label = SceneContent(pool.scene(i % 2, i)).load(), i % 2
        if (victim.decide_images([image])[0] >= 0) == label and len(images) < n_images:
            images.append(image)
            labels.append(label)
    y = torch.tensor(labels)
    settings = RobustnessSettings(protocols=("unsafebench",), n_unsafebench=n_images, batch_size=batch_size)
    started = time.perf_counter()
    outcomes = {one.attack: one for one in PROTOCOLS["unsafebench"](victim, images, y.numpy(), settings)}
    print(f"{len(images)} scenes that the guard has right, {encoder.name}, guardkit took {time.perf_counter() - started:.0f} s")
    pixels = torch.stack([encoder.preprocess(image) for image in images])
    model = foolbox.PyTorchModel(Softmaxed(victim).eval(), bounds=(-3, 3), preprocessing=None)
    for name, attack in attacks.items():
        torch.manual_seed(0)
        started = time.perf_counter()
        theirs = []
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            _, changed, _ = attack(model, pixels[part], y[part], epsilons=EPSILON)
            with torch.no_grad():
                theirs.append(model(changed).argmax(dim=1) == y[part])
        right, mine = torch.cat(theirs), torch.zeros(len(images), dtype=torch.bool)
        outcome = outcomes[name]
        mine[outcome.rows] = torch.from_numpy(outcome.values >= 0) == y[outcome.rows].bool()
        print(
            f"{name:<9} robust accuracy {mine.float().mean():.3f}, foolbox {right.float().mean():.3f}, "
            f"{int((mine != right).sum())} of {len(images)} images decided otherwise ({time.perf_counter() - started:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main(**{key: int(value) for key, value in (argument.split("=") for argument in sys.argv[1:])})
