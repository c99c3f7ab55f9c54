"Keypoints: files, crops, mirrors, heat, PCK, and the task with sweep, card, noise and training."
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from noisyseg import (MaxGaussian, Quantize, load_model, perturbed, plot_sweep, robustness_card, save_model, sweep)
from noisyseg.data.keypoints import (CRITTER, Pose, animal_pose, critter, critters, cut_out, keypoint_dataloaders,
                                     mirror_order, mirrored, read_keypoints)
from noisyseg.measure.keypoints import KeypointTask, places
from noisyseg.nets.pose import pose_tiny
from noisyseg.perturb.selectors import kernels_and_scales
from noisyseg.train.keypoints import HeatLoss, heat_targets, keypoint_learner


@pytest.fixture(scope='module')
def dls(): return critters(32, 16, size=32, seed=0)


def small(): return pose_tiny(len(CRITTER), width=8, filters=(4, 6, 8, 8))


def marked(size, points):
    "A black picture with white pixels"
    image = np.zeros((size, size, 3), np.uint8)
    for x, y in points: image[y, x] = 255
    return image


def test_points_move_with_their_picture():
    "A white pixel is where its keypoint is, after cutting and enlarging, at any place of the square"
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(10, 40, 2)
        pose = Pose(marked(50, [(x, y)]), np.array([[x + 0.5, y + 0.5, 1]], np.float32), (5, 5, 45, 45))
        cut, found = cut_out(pose.image, pose, 100, 50, rng.uniform(15, 35, 2))
        light = cut[..., 0].astype(float)
        light[(cut == 124).all(2)] = 0
        if not found[0, 2]: continue
        v, u = np.unravel_index(light.argmax(), light.shape)
        assert abs(u + 0.5 - found[0, 0]) <= 1.5 and abs(v + 0.5 - found[0, 1]) <= 1.5
        assert found[0, 2] == pytest.approx(80)


def test_outside_is_not_known():
    pose = Pose(marked(50, []), np.array([[2, 2, 1], [25, 25, 1], [25, 25, 0]], np.float32), (20, 20, 30, 30))
    assert (cut_out(pose.image, pose, 32, 12, (25, 25))[1][:, 2] > 0).tolist() == [False, True, False]


def test_twice_mirrored_is_as_before():
    y = np.random.default_rng(0).uniform(0, 32, (len(CRITTER), 3)).astype(np.float32)
    names = list(CRITTER)
    once = mirrored(y.copy(), names, 32)
    assert np.allclose(mirrored(once, names, 32), y, atol=1e-5)
    assert once[names.index('left_ear'), 2] == y[names.index('right_ear'), 2]


@pytest.mark.parametrize('left, right', [
    ('left_eye', 'right_eye'), ('L_eye', 'R_eye'), ('Left_Eye', 'Right_Eye'), ('leftEye', 'rightEye'), ('LEye', 'REye'),
    ('eye-left', 'eye-right'), ('eye left', 'eye right'), ('lefteye', 'righteye'), ('EYE_L', 'EYE_R'), ('earL', 'earR'),
    ('eyeleft', 'eyeright'), ('left', 'right'), ('upper left eye', 'upper right eye')])
def test_sides_in_any_spelling(left, right):
    y = np.array([[10, 1, 1], [20, 1, 1], [30, 1, 1]], np.float32)
    assert mirrored(y, [left, 'nose', right], 64)[:, 0].tolist() == [34, 44, 54]


@pytest.mark.parametrize('name', ['left_eye', 'L_eye', 'earR', 'Righteye'])
def test_a_side_without_a_partner(name):
    pose = Pose(marked(50, []), np.ones((2, 3), np.float32), (5, 5, 45, 45))
    with pytest.raises(ValueError, match=f"'{name}' is on one side.*augment=False"):
        keypoint_dataloaders([pose], [pose], ['nose', name], 32, 1)
    assert keypoint_dataloaders([pose], [pose], ['nose', name], 32, 1, augment=False).vocab == ['nose', name]


def test_names_without_sides():
    for names in (['upright', 'bright_spot', 'L1', 'L5', 'clr'], ['l', 'm', 'r'], [0, 1, 2]):
        assert mirror_order(names) == [*range(len(names))]
    with pytest.raises(ValueError, match='differ in more than their spelling'): mirror_order(['nose_tip', 'Nose-Tip'])


def test_categories_of_other_names(tmp_path, monkeypatch):
    "The line that is offered makes a file of each"
    monkeypatch.chdir(tmp_path)
    file = tmp_path/'k.json'
    file.write_text(json.dumps(dict(
        images=[dict(id=1, file_name='a.jpg')],
        categories=[dict(id=1, name='cat', keypoints=['nose', 'tail']),
                    dict(id=2, name='man', keypoints=['head', 'foot'])],
        annotations=[dict(image_id=1, category_id=k, bbox=[0, 0, 5, 5], keypoints=[k, 1, 2, 3, 3, 2])
                     for k in (1, 2)])))
    with pytest.raises(ValueError, match="'cat' and 'man' have keypoints of other names") as e:
        read_keypoints(file, tmp_path)
    exec(str(e.value).split('category k, ')[1], dict(json=json, Path=Path, file=file, k=2))
    names, (one,) = read_keypoints('2.json', tmp_path)
    assert names == ['head', 'foot'] and one.points[0, 0] == 2


def test_one_seed_is_one_set(dls):
    again = critters(32, 16, size=32, seed=0)
    for a, b in zip(dls.train_ds, again.train_ds): assert a[0].equal(b[0]) and a[1].equal(b[1])
    assert not dls.train_ds.item(0, 1)[0].equal(dls.train_ds.item(0, 0)[0])
    assert dls.valid_ds.item(0, 1)[0].equal(dls.valid_ds.item(0, 0)[0])
    assert (critter(3).image == critter(3).image).all()


def test_pictures_stay_on_one_side(tmp_path):
    "Two animals of one picture are never split; animals with few keypoints are left out"
    from PIL import Image
    for name in 'abcdef': Image.fromarray(marked(20, [(3, 3)])).save(tmp_path/f'{name}.png')
    animal = lambda k, n: dict(image=f'{k}.png', box=[1, 1, 18, 18], keypoints=[[3, 3, 1]] * n + [[0, 0, 0]] * (6 - n))
    animals = [animal(k, 5) for k in 'abcdef' for _ in range(2)] + [animal('a', 4)]
    (tmp_path/'k.json').write_text(json.dumps(dict(names=list('uvwxyz'), animals=animals)))
    dls = animal_pose(tmp_path/'k.json', tmp_path, 0.3, bs=2, size=16, seed=0)
    train, valid = ({o.image for o in ds.items} for ds in (dls.train_ds, dls.valid_ds))
    assert not train & valid and len(dls.train_ds) + len(dls.valid_ds) == 12
    assert len(animal_pose(tmp_path/'k.json', tmp_path, ['b'], bs=2, size=16, seed=0, few=4).train_ds) == 4
    with pytest.raises(ValueError, match="expected 'images'"):
        (tmp_path/'x.json').write_text('{"a": 1}')
        read_keypoints(tmp_path/'x.json', tmp_path)
    with pytest.raises(ValueError, match='0 to validate on'): keypoint_dataloaders([animals], [], list('uvwxyz'))


@pytest.mark.parametrize('how, near', [('quarter', 1.5), ('soft', 0.2)])
def test_targets_are_read_back(how, near):
    "The place that a target was made of is the place that is read off it"
    y = torch.cat([torch.rand(4, 7, 2) * 40 + 12, torch.full((4, 7, 1), 50.)], 2)
    heat = heat_targets(y, (16, 16), (64, 64))
    assert torch.allclose(heat.sum((2, 3)), torch.ones(4, 7), atol=1e-5)
    assert (places((heat + 1e-20).log(), (64, 64), how) - y[..., :2]).abs().max() <= near


def test_unknown_keypoints_teach_and_count_nothing():
    heat = torch.randn(2, 3, 8, 8, requires_grad=True)
    y = torch.rand(2, 3, 3) * 20
    y[:, 1, 2] = 0
    HeatLoss()(heat, y).backward()
    assert not heat.grad[:, 1].any() and heat.grad[:, 0].any()
    meter = KeypointTask().meter(['a', 'b', 'c'])
    meter.update(y[..., :2], y)
    (_, _, a, n), (_, _, b, m), _, (_, _, total, k) = meter.rows()
    assert (a, n, m, total, k) == (1, 2, 0, 1, 4) and b != b


def test_a_sweep_by_hand(dls):
    "PCK of a sweep is what one counts by hand under the same noise; afterwards all is as before"
    torch.manual_seed(0)
    net, task = small().eval(), KeypointTask(0.2)
    start = {k: v.clone() for k, v in net.state_dict().items()}
    df = sweep({'a': net}, dls.valid, MaxGaussian(), levels=[0, 0.2], draws=2, task=task, where=kernels_and_scales,
               progress=False)
    assert set(df['class'].dropna()) >= set(CRITTER)
    right = known = 0
    for x, y in dls.valid:
        x, y = (o.as_subclass(torch.Tensor) for o in (x, y))
        with torch.no_grad(): found = places(net(x), x.shape[2:])
        ok = y[..., 2] > 0
        right += int(((found - y[..., :2]).norm(dim=2) <= 0.2 * y[..., 2])[ok].sum())
        known += int(ok.sum())
    clean = df[(df['metric'] == 'PCK') & (df['level'] == 0)]
    assert clean['value'].item() == right / known and clean['n_pixels'].item() == known
    card = robustness_card({'a': net}, dls.valid, {'noise': MaxGaussian(), 'bits': Quantize()}, draws=2, task=task,
                           progress=False)
    assert set(card['disturbance']) == {'clean', 'noise', 'bits'} and plot_sweep(df, metric='PCK').data
    assert all(torch.equal(v, start[k]) for k, v in net.state_dict().items())


def test_names_with_several_training_seeds(dls):
    "Keypoints keep their names where a way of training has several networks"
    df = sweep({('a', seed): small() for seed in (0, 1)}, dls.valid, MaxGaussian(), levels=[0], task=KeypointTask(),
               progress=False)
    assert set(df['class'].dropna()) - {''} == set(CRITTER)


def test_training_under_noise(dls, tmp_path):
    "Weight noise trains this task like any other; a checkpoint brings the network back"
    torch.manual_seed(0)
    learn = keypoint_learner(dls, small(), MaxGaussian(0.1), noise_args=dict(seed=0))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 5e-3)
    assert learn.recorder.metric_names[3] == 'pck' and 0 <= learn.recorder.values[-1][2] <= 1
    x = next(iter(dls.valid))[0]
    again = load_model(save_model(learn, tmp_path/'net'))
    with torch.no_grad(): assert torch.equal(again(x), learn.model.eval()(x))
    with perturbed(learn.model, MaxGaussian(0.1)), pytest.raises(RuntimeError): learn.save('net')
    with pytest.raises(TypeError, match='get_preds'): learn.tta()
    with pytest.raises(ValueError, match='no law='): keypoint_learner(dls, noise_args=dict(seed=0))
