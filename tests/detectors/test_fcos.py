"""FCOS from YAML equals Detectron2's. Images without objects train with every version."""

import pytest
import torch
from conftest import make_batch, tiny_fcos_cfg
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.modeling.meta_arch.fcos import FCOS as StockFCOS
from detectron2.utils.events import EventStorage

from fgbg_kd import get_fgbg_kd_cfg
from fgbg_kd.data import check_num_classes, register_datasets


def losses_of(model, batch):
    with EventStorage():
        return model.train()(batch)


@pytest.mark.slow
def test_the_defaults_are_the_zoos_lazy_config():
    """Same names, same initial weights, same losses, same detections."""
    cfg = get_fgbg_kd_cfg()
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "FCOS", "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_fcos_resnet_fpn_backbone"
    lazy = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model
    torch.manual_seed(0)
    ours = build_model(cfg)
    torch.manual_seed(0)
    stock = instantiate(lazy)
    assert type(stock) is StockFCOS
    state = stock.state_dict()
    assert ours.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in ours.state_dict().items())
    trained = {k for k, p in stock.named_parameters() if p.requires_grad}
    assert {k for k, p in ours.named_parameters() if p.requires_grad} == trained
    batch = make_batch(boxes=(((5, 5, 30, 40), (10, 10, 20, 18)), ((4, 4, 40, 60),)))
    values, expected = losses_of(ours, batch), losses_of(stock, batch)
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[k], v) for k, v in expected.items())
    for model in (ours, stock):
        torch.nn.init.constant_(model.head.cls_score.bias, 0.0)  # or nothing is over the threshold
    with torch.no_grad():
        found = [model.eval()(batch[:1])[0]["instances"] for model in (ours, stock)]
    assert len(found[0]) > 0 and torch.equal(found[0].scores, found[1].scores)


def test_images_without_objects_are_background_everywhere():
    model = build_model(tiny_fcos_cfg())
    some, none = make_batch(boxes=(((5, 5, 30, 40),), ()))
    images = model.preprocess_image([some, none])
    features = list(model.backbone(images.tensor).values())[:3]
    anchors = model.anchor_generator(features)
    labels, _ = model.label_anchors(anchors, [some["instances"], none["instances"]])
    expected, _ = StockFCOS.label_anchors(model, anchors, [some["instances"]])
    assert torch.equal(labels[0], expected[0]) and (labels[0] < model.num_classes).any()
    assert (labels[1] == model.num_classes).all()
    assert len(none["instances"]) == 0  # the input is left as it was


@pytest.mark.parametrize("boxes", [((), ()), (((5, 5, 30, 40),), ())])
def test_a_batch_with_images_without_objects_trains(boxes):
    model = build_model(tiny_fcos_cfg())
    losses = losses_of(model, make_batch(boxes=boxes))
    assert losses["loss_fcos_cls"] > 0
    assert (losses["loss_fcos_loc"] > 0) == (boxes[0] != ())
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)


def test_the_keys_reach_the_detector():
    cfg = tiny_fcos_cfg()
    cfg.INPUT.FORMAT = "RGB"
    node, expected = cfg.MODEL.FCOS, {}
    for key, value, attribute in (
        ("CENTER_SAMPLING_RADIUS", 2.5, "center_sampling_radius"),
        ("FOCAL_LOSS_ALPHA", 0.5, "focal_loss_alpha"),
        ("FOCAL_LOSS_GAMMA", 1.5, "focal_loss_gamma"),
        ("SCORE_THRESH_TEST", 0.3, "test_score_thresh"),
        ("TOPK_CANDIDATES_TEST", 77, "test_topk_candidates"),
        ("NMS_THRESH_TEST", 0.55, "test_nms_thresh"),
    ):
        node[key], expected[attribute] = value, value
    node.NORM, node.PRIOR_PROB, node.NUM_CONVS = "", 0.5, 3
    model = build_model(cfg)
    assert isinstance(model, META_ARCH_REGISTRY.get("FCOS"))
    assert {name: getattr(model, name) for name in expected} == expected
    assert model.input_format == "RGB"
    assert model.head.cls_score.bias.abs().max() < 1e-6  # the logit of 0.5
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.head.cls_subnet) == 3
    assert not any(isinstance(m, torch.nn.GroupNorm) for m in model.modules())


@pytest.mark.parametrize("distance, empty", [(0.0, True), (1.0, False)])
def test_an_initial_distance_keeps_all_boxes_from_being_empty(distance, empty):
    """Detectron2 clips negative distances to 0, where the box loss has no gradient."""
    cfg = tiny_fcos_cfg()
    cfg.MODEL.FCOS.INITIAL_DISTANCE = distance
    model = build_model(cfg)
    images = model.preprocess_image([make_batch(boxes=((),))[0]])
    features = [model.backbone(images.tensor)[name] for name in cfg.MODEL.FCOS.IN_FEATURES]
    distances = torch.cat([d.flatten() for d in model.head(features)[1]])
    assert bool((distances <= 0).any()) == empty
    assert abs(distances.mean() - distance) < 0.1


def test_data_of_other_classes_name_fcos_key(coco):
    cfg = tiny_fcos_cfg(coco)
    register_datasets(cfg)
    with pytest.raises(ValueError, match="2 classes .* has 80: set MODEL.FCOS.NUM_CLASS"):
        check_num_classes(cfg, 80)
