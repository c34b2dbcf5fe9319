"""Checkpoints: exact, written completely or not at all, the newest two kept, a damaged one skipped."""

import copy

import pytest
import torch

from dpoctl.errors import InputError
from dpoctl.training import checkpoints


def small(seed: int):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))


def update(model, optimizer, step: int) -> None:
    torch.manual_seed(step)
    (model(torch.randn(8, 4)) ** 2).mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop])
def test_a_resumed_run_is_bit_identical(tmp_path, kind):
    model = small(0)
    optimizer = kind(model.parameters(), lr=0.01)
    for step in range(3):
        update(model, optimizer, step)
    checkpoints.save(tmp_path, 3, model, optimizer, {"tokens": 7})
    saved = copy.deepcopy(model)
    for step in range(3, 6):
        update(model, optimizer, step)
    other = small(1)
    resumed = kind(other.parameters(), lr=0.01)
    state = checkpoints.load_latest(tmp_path, other, resumed)
    assert state == {"tokens": 7, "step": 3}
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), saved.parameters(), strict=True))
    for step in range(3, 6):
        update(other, resumed, step)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("fused", [True, False])
def test_the_count_of_updates_is_restored_where_the_optimizer_keeps_it(tmp_path, fused):
    """A fused step on a GPU reads it from the device's memory; other steps keep it on the CPU."""
    model = small(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    update(model, optimizer, 0)
    checkpoints.save(tmp_path, 1, model, optimizer, {})
    other = small(1).to("meta")
    resumed = torch.optim.AdamW(other.parameters(), lr=0.01)
    resumed.param_groups[0]["fused"] = fused  # which torch refuses for a device without such a kernel
    checkpoints.load_latest(tmp_path, other, resumed)
    kept = [resumed.state[p] for p in other.parameters()]
    assert {state["step"].device.type for state in kept} == {"meta" if fused else "cpu"}
    assert {state["exp_avg"].device.type for state in kept} == {"meta"}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "checksums.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_skipped(tmp_path, capsys, name, damage):
    model = small(0)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01)
    for step in (1, 2, 3):
        update(model, optimizer, step)
        checkpoints.save(tmp_path, step, model, optimizer, {})
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000002", "step-00000003"]
    path = tmp_path / "checkpoints/step-00000003" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.unlink()
    if damage != "gone":
        path.write_bytes(data if damage == "flip" else data[:-9])
    assert checkpoints.load_latest(tmp_path, model, optimizer)["step"] == 2
    assert "falling back" in capsys.readouterr().err
    checkpoints.save(tmp_path, 3, model, optimizer, {})  # the run reaches step 3 again and replaces it
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000002", "step-00000003"]
    assert checkpoints.load_latest(tmp_path, model, optimizer)["step"] == 3
    (tmp_path / "checkpoints/step-00000003/checksums.json").unlink()
    (tmp_path / "checkpoints/step-00000002/checksums.json").unlink()
    with pytest.raises(InputError, match="damaged"):
        checkpoints.load_latest(tmp_path, model, optimizer)


def test_ranks_that_write_into_one_folder_do_not_meet(tmp_path):
    """Each rank asks for the permissions of new files beside its own file, at any instant."""
    from threading import Thread

    from dpoctl.outputs.files import use_mode_of_new_files

    failures = []

    def rank(name: str) -> None:
        file = tmp_path / name
        file.touch(0o600)
        for _ in range(300):
            try:
                use_mode_of_new_files(file)
            except OSError as e:
                failures.append(e)

    threads = [Thread(target=rank, args=(f"model-{n}.safetensors",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(list(tmp_path.iterdir())) == 4
