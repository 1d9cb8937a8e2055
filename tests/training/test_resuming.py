"""Runs that go on from their checkpoint, or begin with the weights of another."""

import pytest
import torch
from conftest import losses, read_csv, without_seconds

from locallip import checkpoints
from locallip.files import InputError
from locallip.training import run as training_run
from locallip.training import step as training_step


@pytest.mark.parametrize("loss", [[], ["--gloro"]], ids=["bcp", "gloro"])
def test_a_resumed_run_agrees_with_an_uninterrupted_one(runs, loss):
    straight = runs.train(*loss, name="straight")
    resumed = runs.train_in_two_parts(*loss, name="resumed")
    assert [row["epoch"] for row in read_csv(resumed.log)] == ["1", "2", "3", "4"]
    assert losses(resumed.log)[:2] == losses(straight.log)[:2]
    # The singular vectors are re-estimated, closer to the true ones than the short warm-started iterations were.
    assert losses(resumed.log)[2:] == pytest.approx(losses(straight.log)[2:], rel=0.05)


def test_with_the_singular_vectors_kept_a_resumed_run_is_the_uninterrupted_one(runs, capsys):
    straight = runs.train(name="straight")
    resumed = runs.train_in_two_parts("--keep_vectors", name="resumed")
    assert without_seconds(resumed.log) == without_seconds(straight.log)
    assert "anew" not in capsys.readouterr().out


def test_a_resumed_run_says_when_it_has_to_find_singular_vectors_anew(runs, capsys):
    runs.train_until(3)
    runs.train("--resume")
    assert "not kept (--keep_vectors), the first epoch finds them anew" in capsys.readouterr().out


def test_singular_vectors_do_not_outlive_the_epoch_that_they_are_of(runs, capsys):
    runs.train_until(2, "--keep_vectors")
    files = runs.files()
    kept = torch.load(files.vectors, weights_only=True)
    assert kept["epoch"] == 2
    torch.save(kept | {"epoch": 1}, files.vectors)  # as when a kill comes between checkpoint and vectors
    runs.train_until(3, "--resume")
    assert "finds them anew" in capsys.readouterr().out
    assert not files.vectors.exists()


def test_a_run_with_global_norms_alone_has_no_singular_vectors_to_keep_or_to_find(runs, capsys):
    runs.train_in_two_parts("--global_epochs", 4, "--keep_vectors")
    assert "anew" not in capsys.readouterr().out
    assert not runs.files().vectors.exists()


def test_singular_vectors_of_other_images_are_refused(runs):
    runs.train_until(2, "--keep_vectors")
    vectors = runs.files().vectors
    kept = torch.load(vectors, weights_only=True)
    fewer = {position: vector[1:] for position, vector in kept["vectors"].items()}
    for spoilt in ({}, [kept], kept | {"vectors": {}}, kept | {"vectors": fewer}):
        torch.save(spoilt, vectors)
        before = runs.contents()
        with pytest.raises(InputError, match=r"tiny_vectors.pth is .*; remove it, and the first epoch finds"):
            runs.train("--resume")
        assert runs.contents() == before
    vectors.write_bytes(b"no vectors")
    with pytest.raises(InputError, match="is no file of singular vectors"):
        runs.train("--resume")
    vectors.unlink()
    assert len(read_csv(runs.train("--resume").log)) == 4


def test_a_resumed_run_goes_on_with_the_order_of_the_images_and_the_schedule(runs, monkeypatch):
    visits, step = [], training_step.Step.__call__

    def record(self, x, y, indices, epsilon, kappa, *more):
        visits.append((epsilon, kappa, indices.tolist()))
        return step(self, x, y, indices, epsilon, kappa, *more)

    monkeypatch.setattr(training_step.Step, "__call__", record)
    runs.train(name="straight")
    straight = visits.copy()
    visits.clear()
    runs.train_in_two_parts(name="resumed")
    assert visits == straight


def test_a_resumed_run_keeps_the_best_epoch_of_before(runs, monkeypatch):
    errors = iter([0.5, 0.3, 0.4, 0.35])
    monkeypatch.setattr(
        training_run._Run,
        "_validate",
        lambda run, box: {"validation_clean_error": 0.0, "validation_certified_error": next(errors)},
    )
    best = torch.load(runs.train_in_two_parts().best, weights_only=True)
    assert (best["err"], best["epoch"]) == (0.3, 2)


def test_resuming_a_finished_run_changes_nothing(runs):
    runs.train()
    before = runs.contents()
    runs.train("--resume")
    assert runs.contents() == before


@pytest.mark.parametrize(
    "flags", [["--lr", 0.1], ["--epochs", 5], ["--loss", "gloro"], ["--seed", 1], ["--val_split", 28], ["--width", 0.1]]
)
def test_resume_refuses_other_arguments(runs, flags):
    runs.train("--epochs", 1, "--rampup", 0)
    before = runs.contents()
    with pytest.raises(InputError, match=flags[0]):
        runs.train("--epochs", 1, "--rampup", 0, *flags, "--resume")
    assert runs.contents() == before


@pytest.mark.parametrize("flags", [["--lr_warmup", 0.5], ["--epsilon_schedule", "log"]])
def test_a_run_from_before_there_was_a_flag_ran_without_it(runs, flags):
    files = runs.train("--epochs", 1, "--rampup", 0)
    checkpoint = checkpoints.load_checkpoint(files.checkpoint)
    del checkpoint["arguments"][flags[0][2:]]
    checkpoints.save_checkpoint(files.checkpoint, checkpoint)
    runs.train("--epochs", 1, "--rampup", 0, "--resume")
    with pytest.raises(InputError, match=flags[0]):
        runs.train("--epochs", 1, "--rampup", 0, *flags, "--resume")


@pytest.mark.parametrize("gloro", [False, True])
def test_the_loss_of_a_run_from_before_there_was_a_choice_is_known(runs, gloro):
    one_epoch, own, other = ["--epochs", 1, "--rampup", 0], [], ["--gloro"]
    if gloro:
        own, other = other, own
    files = runs.train(*one_epoch, *own)
    checkpoint = checkpoints.load_checkpoint(files.checkpoint)
    del checkpoint["arguments"]["loss"], checkpoint["arguments"]["loss_weight"], checkpoint["hardware"]
    checkpoint["arguments"]["gloro"] = gloro
    checkpoints.save_checkpoint(files.checkpoint, checkpoint)
    runs.train(*one_epoch, *own, "--resume")
    with pytest.raises(InputError, match="--loss"):
        runs.train(*one_epoch, *other, "--resume")


def test_a_refused_resume_names_the_run_to_begin_instead(runs):
    checkpoint = runs.train("--epochs", 1, "--rampup", 0).checkpoint
    with pytest.raises(InputError, match=f"another --prefix, with --start_from {checkpoint}$"):
        runs.train("--epochs", 2, "--rampup", 0, "--resume")
    with pytest.raises(InputError, match=r"another --prefix$"):  # the weights would not fit
        runs.train("--epochs", 1, "--rampup", 0, "--width", 0.1, "--resume")


def test_resume_refuses_a_prefix_without_a_run(runs):
    with pytest.raises(InputError, match="there is nothing to resume"):
        runs.train("--resume")


def test_resume_refuses_a_checkpoint_without_what_resuming_needs(runs, tiny_net):
    path = runs.files().checkpoint
    checkpoints.save_checkpoint(path, {"state_dict": tiny_net.state_dict(), "err": 0.5, "epoch": 1})
    with pytest.raises(InputError, match=r"cannot be resumed: it has no .*optimizer"):
        runs.train("--resume")


# --- starting from the weights of another run


def test_a_run_starts_from_the_weights_of_another(runs):
    first = runs.train(name="first").checkpoint
    trained = checkpoints.load_checkpoint(first)["state_dict"]
    one_epoch = ["--epochs", 1, "--rampup", 0, "--lr", 1e-30, "--start_from", first]
    again = checkpoints.load_checkpoint(runs.train(*one_epoch, name="again").checkpoint)
    assert all(torch.equal(again["state_dict"][key], trained[key]) for key in trained)  # lr 1e-30 moves nothing
    assert again["arguments"]["start_from"] == str(first)
    assert (again["epoch"], len(again["rows"])) == (1, 1)
    assert max(state["step"] for state in again["optimizer"]["state"].values()) == 4  # batches of one epoch


def test_a_run_that_started_from_weights_remembers_it_when_resumed(runs):
    first = runs.train("--epochs", 1, "--rampup", 0, name="first").best
    runs.train_until(2, "--start_from", first, name="parts")
    parts = runs.train("--resume", name="parts")
    assert checkpoints.load_checkpoint(parts.checkpoint)["arguments"]["start_from"] == str(first)
    assert len(read_csv(parts.log)) == 4


def test_the_same_command_resumes_a_run_that_started_from_weights_and_no_other_weights_do(runs):
    first = runs.train("--epochs", 1, "--rampup", 0, name="first").best
    runs.train_until(2, "--start_from", first, name="parts")
    with pytest.raises(InputError, match=f"it ran with --start_from {first}, not elsewhere.pth"):
        runs.train("--start_from", "elsewhere.pth", "--resume", name="parts")
    parts = runs.train("--start_from", first, "--resume", name="parts")
    assert [row["epoch"] for row in read_csv(parts.log)] == ["1", "2", "3", "4"]


def test_a_run_that_began_from_nothing_is_not_resumed_from_weights(runs, saved_net):
    runs.train_until(2)
    with pytest.raises(InputError, match=f"it ran with --start_from None, not {saved_net}"):
        runs.train("--start_from", saved_net, "--resume")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--width", 0.1], "of another architecture"),
        (["--start_from", "nowhere.pth"], "no checkpoint: neither nowhere.pth nor nowhere.pth_best.pth is a file"),
        (["--resume"], "there is nothing to resume: .* drop --resume"),
    ],
)
def test_weights_that_cannot_be_started_from_are_refused_and_nothing_is_written(runs, saved_net, flags, complaint):
    with pytest.raises(InputError, match=complaint):
        runs.train("--start_from", saved_net, *flags)
    assert not [path for path in runs.folder.rglob("tiny*") if path.is_file()]
