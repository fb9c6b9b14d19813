from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from fgbg_kd import FgBgDistiller, build_teacher
from fgbg_kd.detectors import YOLOX

_zoo = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
dataloader, optimizer, lr_multiplier = _zoo.dataloader, _zoo.optimizer, _zoo.lr_multiplier
dataloader.train.mapper.augmentations[0].update(short_edge_length=[240, 360, 480], max_size=640)
dataloader.test.mapper.augmentations[0].update(short_edge_length=416, max_size=416)
_student = L(YOLOX)(depth=0.33, width=0.25, depthwise=True, num_classes=80)
_teacher = dict(config="configs/COCO-Detection/yolox_s.yaml", weights="yolox_s.pth")
model = L(FgBgDistiller)(student=_student, teacher=L(build_teacher)(**_teacher))
train = _zoo.train  # the student starts from random weights, not from the zoo's ResNet-50
train.init_checkpoint, train.output_dir = "", "output/COCO-Detection/lazy_yolox_s_to_nano"
