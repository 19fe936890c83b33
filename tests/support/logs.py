"""What loggers wrote, read back."""

EXPECTED = {
    "prune/threshold",
    "prune/requested",
    "sparsity/total",
    "sparsity/layer_00",
    "sparsity/layer_01",
    "settle/change_layer_00",
    "settle/min_delta",
    "time/step_seconds",
    "time/tokens_per_second",
    "swap/layer_01",
    "swap/sparse_layers",
    "mass/kept",
    "savings/attention_flops",
    "savings/kv_bytes",
    "train/loss",
    "val/loss",
}


def read_csv(folder):
    import csv

    with open(folder / "metrics.csv") as file:
        return [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]


def read_leveldb_log(path, block=2**15):
    """Records of a LevelDB log, the format of a W&B offline file: blocks of checksum, length, type, data."""
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""
