from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from fgbg_kd import FgBgDistiller, build_teacher

_zoo = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
dataloader, optimizer, lr_multiplier = _zoo.dataloader, _zoo.optimizer, _zoo.lr_multiplier
model = L(FgBgDistiller)(
    student=_zoo.model,
    teacher=L(build_teacher)(config="COCO-Detection/retinanet_R_101_FPN_3x.yaml"),
    method=dict(name="FgBg"),
)
train = _zoo.train
train.output_dir = "output/COCO-Detection/lazy_retinanet_R101_3x_to_R50_1x"
