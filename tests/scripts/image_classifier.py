"""A residual image classifier the way one finds it in tutorials, on scikit-learn's digits."""

import argparse
import os

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Dataset, Subset

import trainloop


class Digits(Dataset):
    def __init__(self, augment=False):
        raw = load_digits()
        self.images, self.targets, self.augment = raw.images.astype("float32") / 16.0, raw.target, augment

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        img = torch.from_numpy(self.images[i])[None]
        if self.augment:
            dx, dy = torch.randint(-1, 2, (2,)).tolist()
            img = torch.roll(img, (dx, dy), dims=(1, 2))
        return {"image": img, "label": int(self.targets[i]), "file": f"digit_{i}.png"}


class BasicBlock(torch.nn.Module):
    def __init__(self, cin, cout, stride):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(cout)
        self.conv2 = torch.nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(cout)
        self.down = torch.nn.Conv2d(cin, cout, 1, stride, bias=False) if (cin, stride) != (cout, 1) else None

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.down is None else self.down(x)))


class ResNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(1, 16, 3, 1, 1)
        self.layers = torch.nn.Sequential(BasicBlock(16, 16, 1), BasicBlock(16, 32, 2), BasicBlock(32, 64, 2))
        self.fc = torch.nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(self.layers(F.relu(self.stem(x))).mean((2, 3)))


class Classifier(trainloop.BaseTrainer):
    def __init__(self, args):
        self.args = args
        super().__init__(args.steps, grad_clip=5.0, seed=42, workspace=args.out)

    def build_data_loader(self):
        train = Subset(Digits(augment=True), range(0, 1500))
        return DataLoader(train, self.args.batch_size, shuffle=True, num_workers=2, drop_last=True)

    def build_model(self):
        return ResNet()

    def build_optimizer(self):
        decay = [p for p in self.model.parameters() if p.ndim > 1]
        rest = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": 5e-4, "name": "decay"}, {"params": rest, "name": "no_decay"}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)

    def build_lr_scheduler(self):
        return CosineAnnealingLR(self.optimizer, self.args.steps)

    def build_hooks(self):
        return [trainloop.LoggingHook(20), trainloop.ProgressHook(20, with_records=True, sync=True)]

    def forward(self, batch):
        assert isinstance(batch["file"][0], str)
        logits = self.model(batch["image"])
        acc = (logits.argmax(-1) == batch["label"]).float().mean()
        return F.cross_entropy(logits, batch["label"]), {"metrics": {"acc": acc}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", default=None)
    trainer = Classifier(parser.parse_args())
    trainer.train()

    trainer.model.eval()
    held_out = [Digits()[i] for i in range(1500, 1797)]
    with torch.no_grad():
        logits = trainer.model(torch.stack([item["image"] for item in held_out]).to(trainer.device))
    labels = torch.tensor([item["label"] for item in held_out], device=trainer.device)
    accuracy = (logits.argmax(-1) == labels).float().mean().item()
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"RESULT accuracy={accuracy:.3f}")
