# Mask R-CNN with ViTDet-B and weights of Detectron2's projects/ViTDet. It needs Detectron2 main.
from detectron2 import model_zoo

model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
train = dict(
    init_checkpoint="https://dl.fbaipublicfiles.com/detectron2/ViTDet/COCO/"
    "mask_rcnn_vitdet_b/f325346929/model_final_61ccd1.pkl"
)
