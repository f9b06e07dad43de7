"""Small convolutional models: every dimension, stride, padding and its mode, dilation; and packs of LoRAs for them."""

import torch
from torch import nn

import eigenlorax as ex
from eigenlorax.core.adapter import LoRAFactors
from planted import normal

CHANNELS, HEIGHT, WIDTH = 5, 13, 11
RANK = 3
# what PEFT's own LoRA does not hand on to its first convolution, which leaves other sizes or edges
OWN_WAYS = ("dilated", "circular", "reflected")
CONVOLUTIONS = ("strided", "point", "same", "dilated", "circular", "reflected", "line", "volume")


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.strided = nn.Conv2d(CHANNELS, 7, (3, 5), stride=(2, 1), padding=(1, 2))
        self.point = nn.Conv2d(7, 6, 1)
        self.same = nn.Conv2d(6, 8, (2, 3), padding="same", bias=False)
        self.dilated = nn.Conv2d(8, 9, 3, dilation=2, padding=2)
        self.circular = nn.Conv2d(9, 7, 3, padding=1, padding_mode="circular")
        self.reflected = nn.Conv2d(7, 6, (3, 1), padding=(1, 0), padding_mode="reflect")
        self.line = nn.Conv1d(6, 10, 3, stride=2)
        self.volume = nn.Conv3d(2, 8, (2, 3, 1))
        self.head = nn.Linear(8, 7)

    def forward(self, images):
        x = self.circular(self.dilated(self.same(self.point(self.strided(images).tanh()).tanh()).tanh()).tanh())
        x = self.line(self.reflected(x.tanh()).flatten(2).tanh())
        x = self.volume(x.tanh().reshape(len(x), 2, 5, -1, 1))
        return self.head(x.mean(dim=(2, 3, 4)))


def make_convnet(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(8)
        return ConvNet().to(dtype).eval()


def with_updates(adapter):
    """The network with an adapter's updates added to its weights."""
    model = make_convnet()
    for module, factors in adapter.modules.items():
        weight = model.get_submodule(module).weight
        weight.data += (factors.scaling * factors.up @ factors.down).view(weight.shape)
    return model


def images(n, seed=2):
    return normal(n, CHANNELS, HEIGHT, WIDTH, seed=seed).float()


def random_loras(model, modules, n=3, rank=RANK, seed=40):
    """LoRAs of these modules of a model, which is said by none of them."""
    adapters = []
    for index in range(n):
        factors = {}
        for place, name in enumerate(modules):
            weight = model.get_submodule(name).weight
            one = seed + 1000 * index + 2 * place
            down = 0.2 * normal(rank, *weight.shape[1:], seed=one).float()
            up = 0.2 * normal(len(weight), rank, *[1] * (weight.dim() - 2), seed=one + 1).float()
            factors[name] = LoRAFactors.from_weights(down, up, 1.5)
        adapters.append(ex.from_factors(f"a{index}", factors))
    return adapters


def conv_pack(modules=(*CONVOLUTIONS, "head"), **options):
    adapters = random_loras(make_convnet(), modules)
    return ex.fit(adapters, **{"energy": 1.0, **options}), adapters
