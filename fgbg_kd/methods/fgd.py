"""FGD: feature loss weighted by boxes and the teacher's attention, and global context
(Yang et al., CVPR 2022)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.common import per_level
from .adapters import aligned, build_adapters
from .base import METHOD_REGISTRY, Batch, Method, check_not_negative, check_positive, or_one


@METHOD_REGISTRY.register()
class FGD(Method):
    """L = weight * (L_fg + bg_ratio * L_bg + attention_ratio * L_att + global_ratio * L_global),
    each summed over levels and divided by the number of images:

    L_fg, L_bg: sum of W A_sp A_ch (phi(S) - T)^2, with the teacher's A_sp and A_ch. W is
        1 / (cells of the box) on foreground and 1 / (background cells of the image) on background.
        Each box is foreground on every level. If boxes overlap, the smallest owns the cell.
    A_sp = H W softmax over cells of mean_c |F| / tau, A_ch = C softmax over channels of
        mean_hw |F| / tau.
    L_att = |A_ch(phi(S)) - A_ch(T)|_1 + |A_sp(phi(S)) - A_sp(T)|_1.
    L_global = ||GC_s(phi(S)) - GC_t(T)||^2, with two trained context blocks.

    phi: a 1x1 convolution where channels differ.

    Differences from the published code:

    - Boxes are mapped to cells by stride, and a cell belongs to the box that contains its centre.
      The published code scales boxes by map size / image size. This shifts boxes if a small image
      is padded. It also rounds boxes outwards, so coarse levels have more foreground.
    - Padding is neither foreground nor background. "Cells of the box" are the cells that it owns.
      In the published code they are all cells that it covers.
    - The score convolution of the context blocks has PyTorch's initialisation. The published code
      uses Kaiming initialisation. The authors' recipes initialise the student with the teacher's
      neck and head (MODEL.KD.INHERIT).

    As published:

    - GC_t is trained too, so the target of L_global changes during training.
    - Terms are sums, not means. The default weight is for 256 channels, COCO's image sizes and
      gradient clipping. L_global grows with the number of cells, and L_fg with the number of boxes.
      So the share of L_global is small on small maps. The paper has an attention_ratio of 1, and 5
      for FCOS. The published configs for one-stage detectors have 0.5.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        weight: float,
        bg_ratio: float,
        attention_ratio: float,
        global_ratio: float,
        temperature: float,
    ):
        super().__init__()
        self.ratios = (1.0, bg_ratio, attention_ratio, global_ratio)
        check_not_negative(
            "FGD",
            weight=weight,
            bg_ratio=bg_ratio,
            attention_ratio=attention_ratio,
            global_ratio=global_ratio,
        )
        check_positive("FGD", temperature=temperature)
        self.weight, self.temperature = weight, temperature
        self.adapters = build_adapters(student_channels, teacher_channels)
        self.student_context, self.teacher_context = (
            nn.ModuleList(GlobalContext(c) for c in teacher_channels) for _ in range(2)
        )

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        cells = batch.split("all")
        masks = torch.stack([cells.weight, cells.background.float()], dim=2)
        masks = per_level(masks, cells.level_shapes)  # (N, 2, H, W) each
        contexts = zip(self.student_context, self.teacher_context)
        loss = 0.0
        for mask, gc, (s, t) in zip(masks, contexts, aligned(self.adapters, batch)):
            (space_s, channel_s), (space_t, channel_t) = map(self.attention, (s, t))
            error = (channel_t * (s - t).square()).sum(1, keepdim=True) * space_t  # (N, 1, H, W)
            fg, bg = mask.split(1, dim=1)
            bg = bg / or_one(bg.sum((2, 3), keepdim=True))
            terms = (
                (fg * error).sum(),
                (bg * error).sum(),
                (channel_s - channel_t).abs().sum() + (space_s - space_t).abs().sum(),
                (gc[0](s).to(t.dtype) - gc[1](t).to(t.dtype)).square().sum(),
            )
            loss = loss + sum(r * term for r, term in zip(self.ratios, terms))
        return {"loss_kd": self.weight * loss / len(batch.image_sizes)}, {}

    def attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of cells (N, 1, H, W) and of channels (N, C, 1, 1). Each has mean 1."""
        x = x.abs()
        space, channel = x.mean(1, keepdim=True), x.mean((2, 3), keepdim=True)
        softmax = (space / self.temperature).flatten(1).softmax(1).reshape(space.shape)
        return space[0].numel() * softmax, x.shape[1] * (channel / self.temperature).softmax(1)


class GlobalContext(nn.Module):
    """GC(x) = x + W2 ReLU(LN(W1 sum_p softmax_p(w . x_p) x_p)); W2 starts at 0, so GC(x) = x."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(1, channels // 2)
        self.score = nn.Conv2d(channels, 1, kernel_size=1)
        self.transform = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.LayerNorm(hidden),
            nn.ReLU(),
            nn.Linear(hidden, channels),
        )
        nn.init.zeros_(self.transform[-1].weight)
        nn.init.zeros_(self.transform[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        share = self.score(x).flatten(1).softmax(1)  # (N, HW)
        context = torch.einsum("np,ncp->nc", share.to(x.dtype), x.flatten(2))
        return x + self.transform(context)[..., None, None]
