"""Every fault of a broken file is reported at once, with its line and what to write instead."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from gateway.config import load
from gateway.errors import ConfigError

CORPUS: list[tuple[str, list[str]]] = [
    ("server: {http_prot: 1}", ["1: server.http_prot: unknown key 'http_prot'; did you mean 'http_port'?"]),
    ("servers: {}", ["1: servers: unknown key 'servers'; did you mean 'server'?"]),
    ("zzz: 1", ["1: zzz: unknown key 'zzz'; the keys here are: defaults, inference_log, models, registries, server"]),
    (
        'server:\n  http_port: "8000"',
        ['2: server.http_port: expected a whole number, found the text "8000"; write for example http_port: 8000'],
    ),
    ("server:\n  http_port: 8000.5", ["2: server.http_port: expected a whole number, found 8000.5"]),
    ("server:\n  http_port: true", ["2: server.http_port: expected a whole number, found true"]),
    ("server:\n  http_port: 70000", ["2: server.http_port: must be at most 65535, found 70000"]),
    ("server:\n  http_port: -1", ["2: server.http_port: must be at least 0, found -1"]),
    ("server:\n  http_port:\n", ["2: server.http_port: expected a whole number, found nothing"]),
    ("server:\n  http_port: [1]", ["2: server.http_port: expected a whole number, found a list"]),
    ("server: 8000", ["1: server: expected keys and values, found 8000"]),
    ("server: [1]", ["1: server: expected keys and values, found a list"]),
    ("- 1", ["1: expected keys and values, found a list; write for example server: {http_port: 8000}"]),
    (
        "server: {log_level: inof}",
        ["1: server.log_level: the text \"inof\" is not possible; did you mean 'info'?"],
    ),
    (
        "server: {log_format: xml}",
        ["1: server.log_format: the text \"xml\" is not possible; write 'console' or 'json'"],
    ),
    (
        "server: {limits: {max_conections: 4}}",
        ["1: server.limits.max_conections: unknown key", "max_connections"],
    ),
    (
        "server: {limits: {max_connections: 0}}",
        ["1: server.limits.max_connections: must be at least 1, found 0"],
    ),
    (
        "server: {limits: {idle_timeout_s: 0}}",
        ["1: server.limits.idle_timeout_s: must be more than 0, found 0"],
    ),
    (
        "server: {limits: {idle_timeout_s: .inf}}",
        ["1: server.limits.idle_timeout_s: .inf is not a usable number"],
    ),
    ("server: {limits: 3}", ["1: server.limits: expected keys and values, found 3"]),
    (
        "server: {http_port: 9, metrics_port: 9}",
        ["1: server.metrics_port: http_port and metrics_port are both 9"],
    ),
    ("server: {metrics_port: 8000}", ["1: server.metrics_port: http_port (by default) and metrics_port are both 8000"]),
    ("server: {http_port: 8002}", ["1: server.http_port: http_port and metrics_port (by default) are both 8002"]),
    (
        "server:\n  host: 0.0.0.0",
        ["2: server.host: '0.0.0.0' can be reached from other machines", "insecure: true"],
    ),
    ("server: {host: example.org}", ["1: server.host: 'example.org' can be reached"]),
    ("server: {host: ''}", ["1: server.host: must be of length at least 1, found length 0"]),
    ("server: {grpc_port: 8002}", ["1: server.grpc_port: grpc_port and metrics_port (by default) are both 8002"]),
    ("server: {http_port: 8001}", ["1: server.http_port: http_port and grpc_port (by default) are both 8001"]),
    ("server: {grpc_port: null}", ["1: server.grpc_port: expected a whole number, found nothing"]),
    (
        "server: {processes: 2}",
        ["1: server.processes: several front-end processes are not supported in this version"],
    ),
    ("server: {processes: true}", ["1: server.processes: several front-end processes are not"]),
    ("server: {tls: {cert: gateway.yaml}}", ["1: server.tls.key: is missing; write for example key: server-key.pem"]),
    (
        "server:\n  tls: {cert: gateway.yaml, key: gateway.yaml, certificate: x}",
        ["2: server.tls.certificate: unknown key 'certificate'; the keys here are: cert, client_ca, key"],
    ),
    (
        "server: {restricted_apis: [{apis: [health], header: a, value: b, key: c}]}",
        ["1: server.restricted_apis[0].key: unknown key 'key'; the keys here are: apis, header, value"],
    ),
    (
        "server: {restricted_apis: [{apis: [health], value: b}]}",
        ["1: server.restricted_apis[0].header: is missing; write for example header: x-admin"],
    ),
    (
        "server: {restricted_apis: [{apis: [], header: a, value: b}]}",
        ["1: server.restricted_apis[0].apis: must be of length at least 1, found length 0"],
    ),
    (
        "server: {restricted_apis: [{apis: [healthy], header: a, value: b}]}",
        ["1: server.restricted_apis[0].apis[0]: the text \"healthy\" is not possible; did you mean 'health'?"],
    ),
    ("server: {cache: {}}", ["1: server.cache: unknown key 'cache'; did you mean 'response_cache'?"]),
    ("server:\n  tls: {cert: a, key: gateway.yaml}", ["2: server.tls.cert: there is no file", "write the path of"]),
    ("server: {compression: {grpc: best}}", ['1: server.compression.grpc: the text "best" is not possible']),
    ("auth: {keys: []}", ["1: auth: 'auth' is not supported in this version; remove it"]),
    ("backends: []", ["1: backends: belongs to one model; write it in an entry of models"]),
    ("registries: []", ["1: registries: expected keys and values, found a list"]),
    (
        "defaults: {authentication: none}",
        ["1: defaults.authentication: 'authentication' is not supported in this version"],
    ),
    ("models: [{source: ., grpc: 1}]", ["1: models[0].grpc: 'grpc' is not supported in this version"]),
    (
        "server: {model_control: always}",
        ["1: server.model_control: "],
    ),
    ("defaults: {backends: []}", ["1: defaults.backends: belongs to one model; write it in an entry of models"]),
    ("defaults: {name: a}", ["1: defaults.name: belongs to one model; write it in an entry of models"]),
    (
        "defaults: {max_queue_delay: 1}",
        ["1: defaults.max_queue_delay: unknown key", "did you mean 'max_queue_delay_ms'?"],
    ),
    ("defaults: {max_queue_delay_ms: -1}", ["1: defaults.max_queue_delay_ms: must be at least 0, found -1"]),
    ("defaults: {deadline_ms: .nan}", ["1: defaults.deadline_ms: .nan is not a usable number"]),
    (
        "defaults: {oversize: splt}",
        ["1: defaults.oversize: the text \"splt\" is not possible; did you mean 'split'?"],
    ),
    (
        "defaults: {batching: [on]}",
        ["1: defaults.batching: a list is not possible; write 'auto', 'on' or 'off'"],
    ),
    ("defaults: {preferred_batch_sizes: 8}", ["1: defaults.preferred_batch_sizes: expected a list, found 8"]),
    (
        "defaults:\n  preferred_batch_sizes:\n    - 8\n    - x",
        ['4: defaults.preferred_batch_sizes[1]: expected a whole number, found the text "x"'],
    ),
    (
        "models: 3",
        ["1: models: expected a list of models, found 3; write for example models: [{source: ./models}]"],
    ),
    ("models: {a: b}", ["1: models: expected a list of models, found keys and values"]),
    ("models:\n  -\n", ["2: models[0]: is empty; write for example - source: ./models"]),
    ("models:\n  - name: a", ["2: models[0].source: is missing; write for example source: ./models/digits"]),
    ("models: [{source: .}, {source: ./nope}]", ["1: models[1].source: there is no directory", "nope"]),
    (
        "models: [{source: a.onnx}]",
        ["1: models[0].source: there is no file", "write the path of an .onnx file"],
    ),
    ("models: [{source: 'http://h:8000/v2'}]", ["1: models[0].source: has more than host and port"]),
    (
        "models: [{source: 'models:/a@b'}]",
        ["1: models[0].source: the configuration does not say where to find it; add registries.mlflow"],
    ),
    (
        "models: [{source: 'ftp://a/b'}]",
        ["1: models[0].source: has the unknown scheme 'ftp://'", "s3://, oci:// or hf://"],
    ),
    ("models: [{source: 's3://a.b/c'}]", ["1: models[0].source: the configuration does not say", "add registries.s3"]),
    (
        "models: [{source: 'models:/a/Production'}]",
        ["1: models[0].source: has the version 'Production', which is no number"],
    ),
    (
        "models: [{source: 'localhost:8000'}]",
        ["1: models[0].source: there is no directory", "for a running server write http://localhost:8000"],
    ),
    (
        "models:\n  - name: a\n    backends: [{url: 'http://h', name: a b}]",
        ['3: models[0].backends[0].name: expected up to 128 of A-Z a-z 0-9 . _ : -, found the text "a b"; write for'],
    ),
    (
        "server:\n  restricted_apis: [{apis: [trace], header: a b, value: v}]",
        ['2: server.restricted_apis[0].header: expected up to 64 of A-Z a-z 0-9 -, found the text "a b"; write for'],
    ),
    (
        "models:\n  - name: a\n    backends: [{url: 'http://h', name: onnx-1}]",
        ["3: models[0].backends[0].name: is what the gateway calls its own workers; choose another"],
    ),
    ("models: [{source: 5}]", ["1: models[0].source: expected text, found 5; write for example source: ./models"]),
    ("server: {host: 5}", ["1: server.host: expected text, found 5; write for example host: 127.0.0.1"]),
    ("models: [{source: ., name: 7}]", ['1: models[0].name: expected text, found 7; write name: "7" (in quotes)']),
    (
        "models: [{name: a, backends: [{url: 5}]}]",
        ["1: models[0].backends[0].url: expected text, found 5; write for example url: http://triton-a:8000"],
    ),
    (
        "models: [{name: a, backends: [{url: 'http://a', zone: 1}]}]",
        ['1: models[0].backends[0].zone: expected text, found 1; write zone: "1" (in quotes)'],
    ),
    (
        "models:\n  - {source: ., name: a}\n  - {source: ., name: a}",
        ["3: models[1].name: the name 'a' is taken by models[0]; choose another"],
    ),
    (
        "models: [{source: ., name: a/../b}]",
        ["1: models[0].name: 'a/../b' cannot be a model name; use 1 to 256"],
    ),
    ("models: [{source: ., name: ..}]", ["1: models[0].name: '..' cannot be a model name"]),
    (
        "models: [{source: ., digest: md5:0}]",
        ["1: models[0].digest: expected sha256: and 64 hexadecimal digits"],
    ),
    (
        "models: [{backends: [{url: 'http://a'}]}]",
        ["1: models[0].name: is missing: a model with backends needs one; write for example name: digits"],
    ),
    ("models: [{name: a, backends: []}]", ["1: models[0].backends: is empty; write for example backends: [{url:"]),
    (
        "models:\n  - name: a\n    backends:\n      - {weight: 2}",
        ["4: models[0].backends[0].url: is missing; write for example url: http://triton-a:8000"],
    ),
    (
        "models: [{name: a, backends: [{url: 'http://a'}], digest: 'sha256:" + "0" * 64 + "'}]",
        ["1: models[0].digest: cannot be checked"],
    ),
    (
        "models: [{name: a, source: 'http://a', backends: [{url: 'http://b'}]}]",
        ["1: models[0].backends: stands beside a source that is a server too"],
    ),
    (
        "models:\n  - name: a\n    backends:\n      - url: http://a\n      - url: HTTP://A:8000",
        ["5: models[0].backends[1].url: is the same as that of backends[0]; keep one of them"],
    ),
    (
        "models: [{name: a, backends: [{url: 'ftp://a'}]}]",
        ["1: models[0].backends[0].url: is no server's URL; write for example http://triton-a:8000"],
    ),
    (
        "models: [{name: a, backends: [{url: 'http://a', wieght: 2}]}]",
        ["1: models[0].backends[0].wieght: unknown key 'wieght'; did you mean 'weight'?"],
    ),
    (
        "models: [{name: a, backends: [{url: 'http://a', weight: 0}]}]",
        ["1: models[0].backends[0].weight: must be more than 0, found 0"],
    ),
    (
        "models: [{name: a, backends: [{url: 'http://a', json: never}]}]",
        ["1: models[0].backends[0].json: the text \"never\" is not possible; write 'auto' or 'always'"],
    ),
    (
        "models: [{name: a, backends: [{url: 'grpc://a', json: always}]}]",
        ["1: models[0].backends[0].json: has no effect on grpc://; remove it"],
    ),
    (
        "models: [{name: a, backends: [{url: 'http://a', tls: {ca: gateway.yaml}}]}]",
        ["1: models[0].backends[0].tls: has no effect on http://; write https:// in url, or remove tls"],
    ),
    (
        "models: [{name: a, backends: [{url: 'https://a', tls: {ca: nope.pem}}]}]",
        ["1: models[0].backends[0].tls.ca: there is no file", "nope.pem; write the path of a PEM file"],
    ),
    (
        "models: [{name: a, backends: [{url: 'https://a', tls: {cert: gateway.yaml}}]}]",
        ["1: models[0].backends[0].tls.key: is missing beside cert; write for example key: gateway-key.pem"],
    ),
    (
        "models: [{name: a, backends: [{url: 'http://a', version: 3}]}]",
        ['1: models[0].backends[0].version: expected text, found 3; write version: "3" (in quotes)'],
    ),
    (
        "models:\n- {name: a, backends: [{url: grpc://a, name: x}]}\n- {name: b, backends: [{url: grpc://b, name: x}]}",
        ["3: models[1].backends[0].name: the name 'x' is taken by grpc://a:8001; choose another"],
    ),
    (
        "models: [{name: a, backends: [{url: 'http://a', headers: {Authorization: 'env:NOT_SET_ANYWHERE'}}]}]",
        ["1: models[0].backends[0].headers.Authorization: the variable NOT_SET_ANYWHERE is not set"],
    ),
    (
        "models: [{name: a, backends: [{url: 'http://a', headers: {x: 'env:no name'}}]}]",
        ["1: models[0].backends[0].headers.x: env: must be followed by the name of a variable"],
    ),
    (
        "models: [{name: a, backends: [{url: 'http://a', headers: {x: 'file:nope'}}]}]",
        ["1: models[0].backends[0].headers.x: the file", "nope cannot be read: No such file or directory"],
    ),
    (
        "models: [{name: a, backends: [{url: 'http://a', headers: {x: 'file:.'}}]}]",
        ["1: models[0].backends[0].headers.x: the file", "cannot be read: Is a directory"],
    ),
    (
        "models: [{name: a, backends: [{url: 'http://a', headers: {Content-Length: '1'}}]}]",
        ["1: models[0].backends[0].headers.Content-Length: is set by the gateway itself; remove it"],
    ),
    (
        "models: [{name: a, backends: [{url: 'http://a', headers: {'a b': x}}]}]",
        ["1: models[0].backends[0].headers.a b: cannot be a header's name"],
    ),
    (
        "models: [{name: a, backends: [{url: 'http://a', headers: {grpc-timeout: x}}]}]",
        ["1: models[0].backends[0].headers.grpc-timeout: cannot be a header's name"],
    ),
    (
        "models: [{name: a, backends: [{url: 'http://a', headers: {X-A: x, x-a: y}}]}]",
        ["1: models[0].backends[0].headers.x-a: stands twice, in capitals and small letters"],
    ),
    (
        "models: [{name: a, backends: [{url: 'http://a', headers: {x: \"a\\r\\nb\"}}]}]",
        ["1: models[0].backends[0].headers.x: its value must be one line of printable ASCII"],
    ),
    ("models: [{source: ., max_attempts: 9}]", ["1: models[0].max_attempts: must be at most 5, found 9"]),
    (
        "defaults: {balancing: pul}",
        ["1: defaults.balancing: the text \"pul\" is not possible; did you mean 'pull'?"],
    ),
    ("defaults: {hedging_percent: 101}", ["1: defaults.hedging_percent: must be at most 100, found 101"]),
    ("server: {probe_interval_s: 0}", ["1: server.probe_interval_s: must be more than 0, found 0"]),
    ("server: {admin_token_file: nope}", ["1: server.admin_token_file: there is no file", "nope"]),
    ("server: {}\nserver: {}", ["2: server: stands twice, first on line 1; keep one of them"]),
    ("server:\n  workers: 1\n  workers: 2", ["3: server.workers: stands twice, first on line 2"]),
    (
        "server:\n  <<: {workers: 1}",
        ["2: server.<<: merge keys are not supported; put shared keys in `defaults`"],
    ),
    ("server: {workers: !!python/name:os.system x}", ["1: server.workers: the tag or value"]),
    ("server: [", ["1: not valid YAML", "check indentation"]),
    ("server:\n\thost: a", ["2: not valid YAML: found character '\\t' that cannot start any token"]),
    ("a: 'b", ["1: not valid YAML"]),
    ("a: *b", ["1: not valid YAML: found undefined alias 'b'"]),
    ("\x01", ["1: holds a control character; remove it"]),
    ("? [1]\n: 2", ["1: a key must be plain text"]),
    ("[" * 5000, ["nested deeper than"]),
]


def faults_of(folder: Path, text: str) -> list[str]:
    file = folder / "gateway.yaml"
    file.write_bytes(text.encode())
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert all(fault.file == str(file) for fault in caught.value.faults)
    return str(caught.value).replace(f"{file}:", "").splitlines()


@pytest.mark.parametrize(("text", "expected"), CORPUS, ids=range(len(CORPUS)))
def test_each_fault_has_its_line_and_says_what_to_write(tmp_path: Path, text: str, expected: list[str]) -> None:
    lines = faults_of(tmp_path, text)
    assert len(lines) == 1, lines
    place, *parts = expected
    assert lines[0].strip().startswith(place), lines
    assert all(part in lines[0] for part in parts), lines


def test_all_faults_of_a_file_come_at_once_in_order_of_lines(tmp_path: Path) -> None:
    text = dedent("""\
        server:
          host: 0.0.0.0
          http_port: "80"
          grpc_port: x
        defaults: {instances: two}
        models:
          - source: ./nope
            name: a b
          - name: x
        modles: []
        """)
    lines = faults_of(tmp_path, text)
    assert [int(line.split(":")[0]) for line in lines] == [2, 3, 4, 5, 7, 8, 9, 10]


def test_aliases_are_followed_but_cannot_explode(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("server: {workers: &n 3, http_port: 1, metrics_port: 2}\ndefaults: {instances: *n}")
    assert load(file).defaults.instances == 3
    bomb = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{name}: &{name} [{','.join(['*' + before] * 10)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
    )
    assert "holds more than 50000 values once aliases are followed" in faults_of(tmp_path, bomb)[0]
    assert "levels" in faults_of(tmp_path, "a: &a [*a]")[0]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file or directory; check the path given with -c"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory; name the file in it with -c"):
        load(tmp_path)
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * (256 * 1024 + 1))
    with pytest.raises(ConfigError, match="larger than 256 KiB"):
        load(big)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"server: {}\n# \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml:2: this line is not UTF-8"):
        load(latin)


def test_faults_of_variables_and_options_name_them() -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, {"http_port": 70000, "grpc_port": "x"}, {"GATEWAY_WORKERS": "x", "GATEWAY_INSTANCES": "0"})
    assert str(caught.value).splitlines() == [
        'command line: --grpc-port: expected a whole number, found the text "x"; write for example --grpc-port 8001',
        "command line: --http-port: must be at most 65535, found 70000; write for example --http-port 8000",
        "environment: GATEWAY_INSTANCES: must be at least 1, found 0; write for example GATEWAY_INSTANCES=2",
        (
            'environment: GATEWAY_WORKERS: expected a whole number, found the text "x"; '
            "write for example GATEWAY_WORKERS=2"
        ),
    ]


@pytest.mark.parametrize(
    ("options", "environ", "expected"),
    [
        (
            {"http_port": 8002},
            {},
            "command line: --http-port: --http-port and metrics_port (by default) are both 8002",
        ),
        (
            {"metrics_port": 9},
            {"GATEWAY_HTTP_PORT": "9"},
            "command line: --metrics-port: GATEWAY_HTTP_PORT and --metrics-port are both 9",
        ),
        (
            {},
            {"GATEWAY_HTTP_PORT": "7"},
            "environment: GATEWAY_HTTP_PORT: GATEWAY_HTTP_PORT and metrics_port (FILE:2) are both 7",
        ),
    ],
)
def test_equal_ports_blame_both_as_the_user_wrote_them(
    tmp_path: Path, options: dict[str, int], environ: dict[str, str], expected: str
) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("server:\n  metrics_port: 7\n" if environ and not options else "")
    with pytest.raises(ConfigError) as caught:
        load(file, options, environ)
    assert str(caught.value) == f"{expected.replace('FILE', str(file))}; give them different ports"
