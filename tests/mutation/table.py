"""The mutations that tests have to notice: a piece of a file, what takes its place, and the tests that are run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Mutation(NamedTuple):
    """`old` is in the file once, `new` takes its place; `why` is the reason if no test can notice the change."""

    file: str
    tests: Sequence[str]
    old: str
    new: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.old.split())} → {' '.join(self.new.split()) or 'nothing'}"


def changes(file: str, tests: str, *changes: tuple[str, ...]) -> list[Mutation]:
    """Of one file: what is there, what takes its place, and perhaps why that can't be noticed."""
    return [Mutation(file, tests.split(), *change) for change in changes]


MUTATIONS: Sequence[Mutation] = (
    # what sites send, and what comes of it
    *changes(
        "fedclip_flwr/exchange/codecs.py",
        "exchange/test_codecs.py",
        ("rounded.clamp(-127, 127).to(torch.int8)", "rounded.to(torch.int8)"),
        ("new[name] - base[name] + residual.get(name, 0.0)", "new[name] - base[name]"),
    ),
    *changes(
        "fedclip_flwr/server/averaging.py",
        "server/test_averaging.py",
        ("fits = weight <= self._room", "fits = weight <= self.ROOM"),
        ("if not (least > -cls.LARGEST and most < cls.LARGEST)", "if least < -cls.LARGEST or most > cls.LARGEST"),
        ("(1 - kept[group]) * self._weights[group] * self.UNIT", "(1 - kept[group]) * self.UNIT"),
        ("usual = median_low(", "usual = median_high("),
        ("self._limit * median_high(", "self._limit * median_low("),
        ("for site in sorted(updates):", "for site in updates:"),
        ("tensor * share for name, tensor", "tensor for name, tensor"),
        ("most * median_low(claims.values())", "most * median_high(claims.values())"),
    ),
    *changes(
        "fedclip_flwr/server/robust.py",
        "server/test_averaging.py",
        ("math.ceil(hostile_share * many)", "math.floor(hostile_share * many)"),
        ("beta=(hostile + 0.25) / many", "beta=hostile / many"),
    ),
    *changes(
        "fedclip_flwr/server/strategy.py",
        "server/test_strategy.py",
        (
            """if site not in weights:
                raise ExchangeError("it was not asked")
            if self.counts(site, report):
                gathering.add(site, state, weights[site])""",
            """if self.counts(site, report):
                gathering.add(site, state, weights.get(site, 1.0))""",
        ),
        ("return report.examples > 0", "return True"),
        ("if site in self.reports:", "if site in self.dropped:"),
        ("asked, self._asked = self._asked, []", "asked = self._asked"),
    ),
    *changes("fedclip_flwr/server/strategy.py", "server/test_screened.py", ("like, self._classes)", "like)")),
    *changes(
        "fedclip_flwr/exchange/link.py",
        "exchange/test_link.py",
        ("if old != task.base:", "if True:"),
        ("(held, mark) == (self._base, self._mark)", "held == self._base"),
        ("target, self.state, self.residual, seed_of", "target, self.state, {}, seed_of"),
        ('seed_of(seed, "up", site, number)', 'seed_of(seed, "up", number)'),
    ),
    *changes(
        "fedclip_flwr/exchange/records.py",
        "exchange/test_records.py",
        (" or not set(record) <= allowed[name]", ""),
        (' or (facts["role"] == HOLDOUT and facts["train"] + facts["validation"])', ""),
        ('if facts["encoded"] > facts["images"]:', 'if not facts["images"]:'),
        ("c > min(n, p)", "c > n"),
    ),
    *changes(
        "fedclip_flwr/flower/inbox.py",
        "flower/test_inbox.py",
        ("[key for key in self._waiting if key in wanted]", "list(self._waiting)"),
        ("_check_size(map(len, reply.contents.values()), most)", "pass"),
    ),
    # rounds
    *changes(
        "fedclip_flwr/server/nodes.py",
        "server/test_hellos.py server/test_rounds.py",
        ("if hello.site in self._connected():", "if hello.site in self.hellos:"),
        ("if reply.metadata.src_node_id != node:", "if reply.metadata.src_node_id is None:"),
        ("self._inbox.give_up(under_way)", "pass"),
        ("self._last_failed -= strategy.reports.keys()", "pass"),
    ),
    *changes(
        "fedclip_flwr/server/nodes.py",
        "server/test_screened.py",
        (" and name not in self.distrusted]", "]"),
        ("if name not in without]) >= least:", "if name not in without]) > least:"),
    ),
    *changes(
        "fedclip_flwr/server/loop.py",
        "server/test_rounds.py server/test_selection.py",
        ("at.round - 1 - at.best.round >= patience", "at.round - at.best.round >= patience"),
        ("self._strategy.memory = memory", "pass"),
        ("(blend for blend in BLENDS if blend < 1), reverse=True)", "(blend for blend in BLENDS if blend < 1))"),
    ),
    *changes(
        "fedclip_flwr/server/loop.py",
        "server/test_screened.py",
        ("self._nodes.trained.update(dict.fromkeys(self._nodes.trained, ATTEMPTS + spoiled))", "pass"),
    ),
    # privacy and secure aggregation
    *changes(
        "fedclip_flwr/exchange/privacy.py",
        "exchange/test_privacy.py",
        ("share = min(1.0, norm / length) if length", "share = norm / length if length"),
    ),
    *changes(
        "fedclip_flwr/server/noised.py",
        "exchange/test_privacy.py",
        ("self._heaviest = max(self._heaviest, weight)", "self._heaviest = weight"),
        ("noised(cut, settings", "noised(mean, settings"),
    ),
    *changes(
        "fedclip_flwr/exchange/secure/masking.py",
        "exchange/secure/test_masking.py",
        ("return sharing // 2 + 1", "return sharing // 2"),
        ("while members * math.ceil(bound / step) >= 2**31:", "while members * math.ceil(bound / step) > 2**31:"),
    ),
    *changes(
        "fedclip_flwr/exchange/secure/member.py",
        "exchange/secure/test_member.py exchange/secure/test_collector.py",
        ("if both := survivors & dropped:", "if both := survivors - survivors:"),
        ("max(masking.threshold(len(self.publics)), FEWEST)", "masking.threshold(len(self.publics))"),
        ('"reveals", [], b"", {**self.pieces', '"reveals", self.private, self.seed, {**self.pieces'),
    ),
    *changes(
        "fedclip_flwr/server/collector.py",
        "exchange/secure/test_collector.py exchange/secure/test_rounds.py",
        ("(needed := max(self._needed[name], masking.FEWEST))", "(needed := self._needed[name])"),
        (" or (size == masking.SEED and masking.digest(secret) != self._shares[name].seed)", ""),
    ),
    *changes(
        "fedclip_flwr/server/secure_sum.py",
        "server/test_screened.py",
        ("len(arrived) < self._least:", "len(arrived) < 1:"),
        ("/ len(self._strategy.reports)", "/ len(self._letters)"),
        ("if len(by) > max(1.0,", "if len(by) >= max(1.0,"),
    ),
    *changes(
        "fedclip_flwr/server/secure_sum.py",
        "server/test_secure_total.py",
        ("self._nodes.discarded = frozenset(strategy.reports)", "pass"),
        ("NUMBERS, SENT = UINT64, torch.int64", "NUMBERS, SENT = UINT32, torch.int32"),
    ),
    # what a run leaves behind
    *changes(
        "fedclip_flwr/exchange/session.py",
        "exchange/test_session.py",
        ("content.digest(json.dumps(self))[:16]", "content.digest(json.dumps(self[:3]))[:16]"),
    ),
    *changes(
        "fedclip_flwr/base/store.py",
        "server/test_resume.py",
        ("if tensorfile.checksum_of_file(path, facts) != claimed:", "if not claimed:"),
    ),
    *changes(
        "fedclip_flwr/runs/ledger.py",
        "runs/test_ledger.py operations/test_forget.py",
        ("self._kept - now.keys()", "set()"),
        ("if given.images}", "}"),
        ("if self._before.same_classes:", "if True:"),
    ),
    *changes(
        "fedclip_flwr/site/given.py",
        "runs/test_ledger.py",
        ("tensor - earlier[name]", "tensor"),
        ("if leave else tensor", "if not leave else tensor"),
    ),
    *changes(
        "fedclip_flwr/runs/checkpoint.py",
        "server/test_resume.py",
        ('"epsilon": result.epsilon,', '"epsilon": None,'),
    ),
    *changes(
        "fedclip_flwr/runs/saved.py",
        "runs/test_saved.py",
        ("not 0 <= blend <= 1:", "blend < 0 or blend > 1:"),
    ),
    *changes(
        "fedclip_flwr/runs/folder.py",
        "runs/test_folder.py",
        ('{"num-server-rounds", "early-stop",', '{"num-server-rounds",'),
        ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
        ('original.get("run", self.path.name)', "self.path.name"),
    ),
    # data and features
    *changes(
        "fedclip_flwr/features/encoded.py",
        "features/test_encoded.py",
        ("content.digest(str(len(templates)), *prompts)", "content.digest(*prompts)"),
        ("self.vocabulary.key, numbers, *images)", "self.vocabulary.key, *images)"),
    ),
    *changes(
        "fedclip_flwr/features/encoded.py",
        "features/test_encoding.py",
        ("content.digest(self.vocabulary.key, *(self._source", "content.digest(*(self._source"),
    ),
    *changes(
        "fedclip_flwr/features/encoding.py",
        "features/test_encoding.py",
        (">= SAME and cosine.min() >= CLOSE", ">= SAME or cosine.min() >= CLOSE"),
    ),
    *changes(
        "fedclip_flwr/features/encoding.py",
        "features/test_encoded.py",
        (
            "features.reshape(len(vocabulary.templates), -1, features.shape[1])",
            "features.reshape(-1, len(vocabulary.templates), features.shape[1]).transpose(0, 1)",
        ),
    ),
    *changes(
        "fedclip_flwr/features/folder.py",
        "features/test_encoded.py",
        ("text[torch.tensor(self._numbers).argsort()]", "text[torch.tensor(self._numbers)]"),
        ("<= int(labels.max()) < len(self._numbers)", "<= int(labels.max()) <= len(self._numbers)"),
    ),
    *changes(
        "fedclip_flwr/base/growing.py",
        "base/test_growing.py",
        ('if remaining or crc != batch["crc"]:', "if remaining:"),
        ("os.fsync(self._features.fileno())\n", "pass\n"),
    ),
    *changes(
        "fedclip_flwr/base/store.py",
        "base/test_store.py",
        ("            lock.acquire(timeout=2)\n", "            pass\n"),
        ("        if not entry:\n            fill()\n", "        if True:\n            fill()\n"),
    ),
    *changes(
        "fedclip_flwr/base/content.py",
        "base/test_content.py exchange/test_session.py",
        ('hasher.update(len(data).to_bytes(8, "little") + data)', "hasher.update(data)"),
        ("if mark != digest(text):", "if not mark:"),
        ("for part in (name, of_file(root / name))", "for part in (of_file(root / name),)"),
        ('return plain if plain == text else f"{plain}-{digest(text)[:8]}"', "return plain"),
    ),
    *changes(
        "fedclip_flwr/base/files.py",
        "base/test_content.py",
        ("len(data := file.read(most + 1)) <= most:", "len(data := file.read(most + 1)) < most:"),
        ("_sync(part)\n            put(part, path)", "put(part, path)\n            _sync(path)"),
    ),
    *changes(
        "fedclip_flwr/base/content.py", "base/test_store.py", ("{s.st_mtime_ns}/{s.st_ctime_ns}/", "{s.st_mtime_ns}/")
    ),
    *changes(
        "fedclip_flwr/base/tensorfile.py",
        "base/test_tensorfile.py",
        ("(name, spec.dtype, *spec.shape, crc)", "(name, spec.dtype, crc)"),
    ),
    *changes(
        "fedclip_flwr/data/partition.py",
        "data/test_partition.py",
        ('seed_of(seed, "partition", domain)', 'seed_of(seed, "partition")'),
        ("content.digest(*how, labels.numpy().tobytes())", "content.digest(*how)"),
    ),
    *changes(
        "fedclip_flwr/data/folder.py",
        "data/test_folder.py",
        ("return path.suffix.lower() in ENDINGS", "return path.suffix in ENDINGS"),
    ),
    *changes(
        "fedclip_flwr/data/images.py",
        "data/test_folder.py data/test_images.py",
        ('f"{label} {mark}" for label, mark in sorted(rows)', 'f"{mark}" for label, mark in sorted(rows)'),
        ("if content.of_bytes(data) != hashed:", "if not hashed:"),
    ),
    *changes(
        "fedclip_flwr/data/dataset.py",
        "data/test_dataset.py",
        ("value is not None and 0 <= value < len(names)", "value is not None and value < len(names)"),
        ("if not self._is_inside(name.rpartition", "if False and not self._is_inside(name.rpartition"),
    ),
    *changes(
        "fedclip_flwr/data/vocabulary.py",
        "data/test_vocabulary.py",
        (
            "for t in self.templates for name in self.class_names",
            "for name in self.class_names for t in self.templates",
        ),
        ("[run.index(name) for name in own]", "[own.index(name) for name in own]"),
    ),
    # sites
    *changes(
        "fedclip_flwr/site/holdings.py",
        "site/test_context.py",
        ('seed_of(seed, "split", name)', 'seed_of(seed, "split")'),
        ("domain not in held_out(holdout, domains)", "domain != holdout"),
    ),
    *changes(
        "fedclip_flwr/learning/recipes.py",
        "site/test_context.py",
        ("-(-examples // settings.batch_size)", "examples // settings.batch_size"),
    ),
    *changes(
        "fedclip_flwr/learning/selection.py",
        "server/test_rounds.py",
        ("min(max(least, round(share * len(able))), len(able))", "min(round(share * len(able)), len(able))"),
    ),
    *changes(
        "fedclip_flwr/site/context.py",
        "test_client_app.py",
        ('own.pop("secure-aggregation", None)', "pass"),
        ('settings.noise_multiplier < float(str(given["noise-multiplier"]))', "settings.noise_multiplier < 0"),
    ),
    *changes("fedclip_flwr/site/context.py", "site/test_context.py", ("if run.delta > delta:", "if False:")),
    *changes(
        "client_app.py",
        "test_client_app.py",
        ("if isinstance(error, ReadError):", "if not expected:"),
    ),
    *changes(
        "fedclip_flwr/site/work.py",
        "test_client_app.py",
        ("trained = privacy.at_site(trained, before, settings)", "pass"),
        ("if task.blend is None else task.blend", "if True else 0.0"),
    ),
    # LoRA
    *changes(
        "fedclip_flwr/learning/lora.py",
        "learning/test_lora.py",
        ("uniform.view(rank, width) / math.sqrt(width)", "uniform.view(rank, width)"),
        ("weight.add_(scaling * (", "weight.add_(("),
    ),
    *changes(
        "fedclip_flwr/features/lora.py",
        "features/test_lora.py",
        ("layer.scaling[NAME] = self.spec.scaling * share", "layer.scaling[NAME] = self.spec.scaling"),
        ("layer.lora_dropout[NAME].training = torch.is_grad_enabled()", "layer.lora_dropout[NAME].training = True"),
        ("second.zero_()", "second.fill_(1e-4)"),
    ),
    *changes(
        "fedclip_flwr/features/towers.py",
        "features/test_lora.py",
        ("model.pre_layrnorm = nn.Identity()", "pass"),
    ),
    # the paper's recipe, and papers
    *changes(
        "fedclip_flwr/learning/recipes.py",
        "experiments/test_paper.py",
        ("length=0.0,", "length=1.0,"),
        ("smallest_batch=2,", "smallest_batch=1,"),
    ),
    *changes("fedclip_flwr/base/settings.py", "experiments/test_paper.py", ('and self.recipe != "paper"  #', "  #")),
    *changes(
        "fedclip_flwr/learning/adapters.py",
        "learning/test_adapters.py",
        ("return unit if self.length == 1.0 else unit * self.length", "return unit"),
        ("own = scaled if self.length == 1.0 else F.normalize(features, dim=-1)", "own = scaled"),
    ),
    *changes(
        "fedclip_flwr/features/folder.py",
        "experiments/test_paper.py",
        ("F.normalize(features.float(), dim=1) * self._norm", "features.float()"),
    ),
    *changes(
        "fedclip_flwr/experiments/paired.py",
        "experiments/test_paired.py",
        ("quantile(LEVEL, count - 1)", "quantile(LEVEL, count)"),
        ("term *= square * (k - 1) / k", "term *= square * k / (k + 1)"),
    ),
    *changes(
        "fedclip_flwr/experiments/printed.py",
        "experiments/test_sweep.py",
        (
            "low, high = (None if bound is None else -bound for bound in (of.high, of.low))",
            "low, high = of.low, of.high",
        ),
        ("int(bool(held_out(holdout, [site])))", "int(site == holdout)"),
    ),
    *changes(
        "fedclip_flwr/experiments/comparison.py",
        "experiments/test_sweep.py",
        ("if source.model == model]", "if source]"),
        ("if known != mark:", "if known is None:"),
    ),
    *changes(
        "fedclip_flwr/learning/training.py",
        "learning/test_training.py",
        ("max(count * 3 // 5, min(count, 1)), count // 5", "count * 3 // 5, count // 5"),
        ("if loss < lowest:", "if loss <= lowest:"),
    ),
    *changes(
        "fedclip_flwr/learning/selection.py",
        "learning/test_training.py",
        ("recipe.first_choice > 0 or not", "not"),
    ),
    *changes(
        "fedclip_flwr/learning/metrics.py",
        "learning/test_metrics.py learning/test_training.py",
        (".ceil().long().clamp(1, BINS) - 1", ".long().clamp(0, BINS - 1)"),
        ("max(-most, min(most, new - old))", "min(most, new - old)"),
    ),
    *changes(
        "fedclip_flwr/learning/adapters.py",
        "learning/test_adapters.py",
        (
            "(1 - self.blend) * own + self.blend * adapted",
            "self.blend * own + (1 - self.blend) * adapted",
        ),
    ),
    # attacks
    *changes(
        "fedclip_flwr/learning/membership.py",
        "learning/test_membership.py",
        ("pulled - products.sum(1) / 2, 4 * noise", "pulled - products.sum(1) / 2, noise"),
        ("return cls(shortened(rows, most_of(basis)), labels,", "return cls(rows, labels,"),
        ("(deviations[name] * unit) ** -2 for name", "(deviations[name] * unit) ** -1 for name"),
        ("both = cosines.square() + self.rows.square() @ other.rows.square().T", "both = 2 * cosines.square()"),
        ("self.right @ self.right.T) + COUNT**2 * same", "self.right @ self.right.T)"),
    ),
    *changes(
        "fedclip_flwr/experiments/canaries.py",
        "experiments/test_audit.py",
        ("{**result.last, **result.noised}", "result.last"),
        ("known = hiding.in_units(known) if hiding else known", "pass"),
    ),
    # settings, and what starts a site and a server
    *changes(
        "fedclip_flwr/base/settings.py",
        "base/test_settings.py test_secure.py",
        ('value <= limits["above"]', 'value < limits["above"]'),
        ("return max(self.min_sites, 3) if", "return max(self.min_sites, 2) if"),
    ),
    *changes(
        "fedclip_flwr/runs/arguments.py",
        "runs/test_arguments.py",
        ("value not in DATA and os.path.isdir(path)", "os.path.isdir(path)"),
    ),
    *changes(
        "fedclip_flwr/flower/pinned.py",
        "flower/test_pinned.py",
        ("if name == DESCRIBED else data == own)", "if name == DESCRIBED else True)"),
        ("_components(data) == _components(own)", "True"),
        ("or not lines.is_loopback(found[0])", "or False"),
    ),
    *changes(
        "fedclip_flwr/flower/supernode.py",
        "flower/test_supernode.py",
        ("elif _is_complete(key, object_store):", "elif True:"),
    ),
    *changes(
        "fedclip_flwr/flower/superlink.py",
        "flower/test_superlink.py",
        ("ActivateNodeRequest | RegisterNodeFleetRequest) and", "RegisterNodeFleetRequest) and"),
        ("if senders != {request.node.node_id}:", "if request.node.node_id not in senders:"),
    ),
)
