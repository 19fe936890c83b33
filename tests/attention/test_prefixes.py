"""Names of layers that differ by one prefix."""

from sparse_prune.attention.prefixes import renamings


def test_all_names_go_by_one_exchange_of_prefixes():
    others = ["net.layers.0.attn", "net.layers.1.attn", "head.attn"]
    names = ["layers.0.attn", "layers.1.attn"]
    assert renamings(names, others) == {("", "net."): dict(zip(names, others[:2], strict=True))}
    names = ["ema.module.layers.0.attn", "ema.module.layers.1.attn"]
    assert renamings(names, others) == {("ema.module.", "net."): dict(zip(names, others[:2], strict=True))}


def test_every_exchange_that_fits_is_found():
    assert set(renamings(["a.0", "a.1"], ["b.0", "b.1", "c.0", "c.1", "d.0"])) == {("a.", "b."), ("a.", "c.")}


def test_names_are_exchanged_in_whole_parts_and_all_or_none():
    assert renamings(["old_attn"], ["new_attn"]) == {}
    assert renamings(["a.0", "a.2"], ["b.0", "b.1"]) == {}
    assert renamings([], ["b.0"]) == {}
