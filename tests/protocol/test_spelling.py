"""Suggestions for mistyped words."""

from gateway.protocol.spelling import nearest, unknown_key


def test_the_nearest_word_is_named_and_nothing_far_away() -> None:
    assert nearest("http_prot", ["http_port", "host"]) == "http_port"
    assert nearest("HTTP_PORT", ["http_port"]) == "http_port"
    assert nearest("zebra", ["http_port"]) is None
    assert nearest("", ["a"]) is None


def test_without_a_near_word_all_keys_are_listed_and_long_words_cut() -> None:
    assert unknown_key("zebra", ["b_key", "a_key"]) == "unknown key 'zebra'; the keys here are: a_key, b_key"
    assert len(unknown_key("z" * 10_000, ["a"])) < 200
