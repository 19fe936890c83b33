import numpy as np
import torch

from sparse_prune import BlockPattern, pictures
from sparse_prune.pictures import BOTTOM, LEFT, TOP, LayerView, draw_atlas, draw_layer, framed_atlas, score_range, views

WHITE = list(pictures.PAPER)


def pattern(*rows, causal=True):
    keep = torch.tensor(rows, dtype=torch.bool)[None]
    return BlockPattern(keep, (8, 8), causal, 8 * len(rows), 8 * len(rows))


def test_a_layer_shows_kept_pruned_and_impossible_blocks():
    picture = draw_layer(pattern([1, 0], [0, 1]), pixels=2)
    assert picture.tolist() == [[list(pictures.KEPT), WHITE], [list(pictures.PRUNED), list(pictures.KEPT)]]
    assert picture.dtype == np.uint8


def test_the_atlas_has_a_column_per_layer_and_a_row_per_head():
    one = BlockPattern(torch.ones(2, 2, 2, dtype=torch.bool), (8, 8), False, 16, 16)
    picture = draw_atlas([LayerView(one), LayerView(one), LayerView(one)], pixels=3, gap=2)
    assert picture.shape == (2 * 6 + 2, 3 * 6 + 2 * 2, 3)
    assert picture[6:8].min() == 255
    assert (picture[:6, :6] == pictures.KEPT).all()
    assert draw_atlas([]).shape == (1, 1, 3)


def test_scores_regrown_and_lost_blocks_have_their_colours():
    now = pattern([1, 1], [1, 0], causal=False)
    before = torch.tensor([[[1, 1], [0, 1]]], dtype=torch.bool)
    scores = torch.tensor([[[0.01, 1.0], [0.5, 0.001]]])
    picture = draw_atlas(views({"a": now}, {"a": scores}, {"a": before}), pixels=1)
    assert picture[0, 0].tolist() == list(pictures.KEPT_WEAK)
    assert picture[0, 1].tolist() == list(pictures.KEPT_STRONG)
    assert picture[1, 0].tolist() == list(pictures.REGROWN)
    assert picture[1, 1].tolist() == list(pictures.LOST)


def test_scores_that_are_unknown_or_equal_still_draw():
    kept = pattern([1, 0], [1, 1])
    for scores in (torch.full((1, 2, 2), torch.inf), torch.zeros(1, 2, 2), torch.ones(1, 3, 3)):
        picture = draw_atlas([LayerView(kept, scores)], pixels=1)
        assert picture[0, 1].tolist() == WHITE
        assert picture[1, 1].tolist() != list(pictures.PRUNED)


def test_thirty_layers_of_nine_heads_fit_on_a_screen():
    layer = BlockPattern.dense(9, 2048, 2048, 64, True)
    height, width, _ = draw_atlas([LayerView(layer)] * 30).shape
    assert height < 700
    assert width < 2100


def test_the_scale_goes_from_the_lowest_to_the_highest_kept_score():
    now = pattern([1, 1], [1, 0], causal=False)
    scores = torch.tensor([[[0.01, 0.9], [torch.inf, 5.0]]])
    assert score_range(views({"a": now}, {"a": scores})) == (np.float32(0.01), np.float32(0.9))
    assert score_range(views({"a": now})) is None
    assert score_range(views({"a": now}, {"a": torch.ones(1, 3, 3)})) is None


def test_the_frame_keeps_the_atlas_and_adds_numbers_and_the_colour_scale():
    layers = [LayerView(BlockPattern.dense(3, 256, 256, 8, True), torch.rand(3, 32, 32) + 0.1)] * 12
    bare, framed = draw_atlas(layers), framed_atlas(layers)
    height, width, _ = bare.shape
    assert framed.shape == (TOP + height + BOTTOM, LEFT + width, 3)
    assert (framed[TOP : TOP + height, LEFT : LEFT + width] == bare).all()
    for number in range(12):  # each layer and each head has its number
        assert framed[:TOP, LEFT + number * 66 : LEFT + number * 66 + 64].min() < 200
    for number in range(3):
        assert framed[TOP + number * 66 : TOP + number * 66 + 64, :LEFT].min() < 200
    below = framed[TOP + height :].reshape(-1, 3).tolist()
    for colour in (pictures.KEPT_WEAK, pictures.KEPT_STRONG, pictures.PRUNED, pictures.REGROWN, pictures.LOST):
        assert below.count(list(colour)) >= 10


def test_the_frame_of_unknown_scores_and_of_few_or_no_layers():
    kept = framed_atlas([LayerView(pattern([1, 0], [1, 1]))])
    assert list(pictures.KEPT) in kept[-BOTTOM:].reshape(-1, 3).tolist()
    assert framed_atlas([]).shape[0] == TOP + 1 + BOTTOM


def test_blocks_are_merged_into_their_mean_colour_where_a_side_gets_too_long(monkeypatch):
    layers = [LayerView(pattern(*([1, 0, 1, 1, 1],) * 5, causal=False))] * 2
    assert draw_atlas(layers, pixels=3, gap=2).shape == (15, 32, 3)
    for most, width in ((31, 2 * 5 * 2 + 2), (21, 2 * 5 + 2), (11, 2 * 3 + 2), (7, 2 * 2 + 2), (5, 2 + 2)):
        monkeypatch.setattr(pictures, "MOST_PIXELS", most)
        assert draw_atlas(layers, pixels=3, gap=2).shape[1] == width
    monkeypatch.setattr(pictures, "MOST_PIXELS", 11)
    picture = draw_atlas(layers, pixels=3, gap=2)
    middle = (np.asarray(pictures.KEPT) + pictures.PRUNED) // 2
    assert picture[0, :3].tolist() == [middle.tolist(), list(pictures.KEPT), list(pictures.KEPT)]
    assert (picture[:, 5:] == picture[:, :3]).all()


def test_a_layer_of_many_heads_is_no_wider_than_that(monkeypatch):
    many = BlockPattern.dense(40, 512, 512, 8, True)
    assert draw_layer(many).shape[1] <= pictures.MOST_PIXELS
    monkeypatch.setattr(pictures, "MOST_PIXELS", 10_000)
    assert draw_layer(many).shape[1] == 40 * (64 + 4) - 4


def test_a_large_model_has_a_picture_that_can_be_looked_at():
    layer = BlockPattern.dense(32, 8192, 8192, 64, True)
    height, width, _ = framed_atlas([LayerView(layer)] * 8).shape
    assert height < 2400 + TOP + BOTTOM
    assert width < 800
