"""The file that MAYFLY_CONFIG names: what it may say, and the place of each problem."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.config.rules_advice import find_warnings
from service.config.rules_file import Account, RulesFile, RulesFileError, read_rules_file
from service.config.rules_keys import ACCOUNT_KEYS, FORWARD_KEYS, RULE_KEYS
from service.config.rules_shape import AccountTable, ForwardTable, RuleTable, make_schema
from service.config.toml_lines import TomlLines
from service.core.forwarding import Target
from service.core.matchers import Pattern, Seconds, Texts
from service.core.rate import Rate
from service.core.rule_words import describe_effect, describe_subject, describe_webhooks
from service.core.rules import Rule
from service.core.secret import Secret

EXAMPLE = Path(__file__).parents[2] / "deploy" / "policy.example.toml"
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


@pytest.fixture
def read(tmp_path):
    def read_text(text):
        path = tmp_path / "mayfly.toml"
        path.write_text(text, encoding="utf-8")
        return read_rules_file(path)

    return read_text


@pytest.fixture
def problems_of(read):
    def find(text):
        with pytest.raises(RulesFileError) as refusal:
            read(text)
        return [problem.partition("mayfly.toml:")[2] for problem in refusal.value.problems]

    return find


def rule(text):
    return f'[[rule]]\nid = "a"\n{text}\n'


# What is valid


def test_a_file_has_rules_and_accounts(read):
    file = read(
        """
        [[rule]]
        id = "film"
        project = ["x", "y*"]
        labels.customer = "acme*"
        output_duration = ">= 60s"
        ttl = "7d"
        record_ttl = "forever"

        [[account]]
        id = "studio"
        api_key_env = "STUDIO_KEY"
        webhook_secret_env = "STUDIO_SECRET"
        min_ttl = "1h"
        max_ttl = "30d"
        rate = "5/second"
        adopt = "all"
        """
    )

    patterns = (Pattern.of("x"), Pattern.of("y*"))
    assert file.rules.rules == (
        Rule(
            "film",
            (Texts("project", patterns), Texts("label.customer", (Pattern.of("acme*"),))),
            Seconds(low=60),
            ttl=7 * DAY,
            record_ttl="forever",
        ),
    )
    assert file.accounts == (Account("studio", "STUDIO_KEY", "STUDIO_SECRET", HOUR, 30 * DAY, Rate(5, 1), "all"),)
    assert file.variables == {"STUDIO_KEY", "STUDIO_SECRET", "STUDIO_KEY_FILE", "STUDIO_SECRET_FILE"}
    assert file.lines == {"film": 2}


def test_an_empty_file_has_no_rules(read):
    file = read("# nothing yet\n")

    assert (file.rules.rules, file.accounts, file.variables) == ((), (), frozenset())
    assert RulesFile().rules.rules == ()


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ('">= 1m"', Seconds(low=60)),
        ('">1m"', Seconds(low=60, is_low_out=True)),
        ('"<= 90s"', Seconds(high=90)),
        ('" < 90s "', Seconds(high=90, is_high_out=True)),
        ('{ min = "10s" }', Seconds(low=10)),
        ('{ max = "5m" }', Seconds(high=300)),
        ('{ min = "10s", max = "5m" }', Seconds(10, 300)),
    ],
)
def test_a_length_is_a_comparison_or_two_bounds(read, text, bounds):
    assert read(rule(f'output_duration = {text}\nttl = "1h"')).rules.rules[0].duration == bounds


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2026-12-31", datetime(2027, 1, 1, tzinfo=UTC)),
        ('"2026-12-31"', datetime(2027, 1, 1, tzinfo=UTC)),
        ("2026-12-31T00:00:00+01:00", datetime(2026, 12, 30, 23, tzinfo=UTC)),
        ('"2026-12-31T00:00:00Z"', datetime(2026, 12, 31, tzinfo=UTC)),
        ("2028-02-29", datetime(2028, 3, 1, tzinfo=UTC)),
    ],
)
def test_expires_is_an_instant_or_the_end_of_a_date(read, text, instant):
    assert read(rule(f"expires = {text}")).rules.rules[0].expires == instant


@pytest.mark.parametrize("does", ["forever = true", 'ttl = "forever"'])
def test_forever_has_two_spellings(read, does):
    (found,) = read(rule(does)).rules.rules

    assert found.is_forever
    assert found.ttl is None


@pytest.mark.parametrize("form", ["\ufeff{}", "{}"])
def test_line_ends_and_marks_of_windows_are_accepted(tmp_path, form):
    path = tmp_path / "mayfly.toml"
    path.write_bytes(form.format('[[rule]]\r\nid = "a"\r\nttl = "1h"\r\n').encode())

    assert read_rules_file(path).lines == {"a": 1}


# What is refused, and where


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ttl = 3600", '3: rule "a": ttl is invalid: it accepts a number with a unit'),
        ('ttl = "3600"', '3: rule "a": ttl is invalid: it accepts a number with a unit'),
        ('ttl = "0s"', '3: rule "a": ttl is invalid: it accepts more than zero'),
        ('record_ttl = 5\nttl = "1h"', '3: rule "a": record_ttl is invalid: it accepts a number with a unit'),
        ('ttl = "1h"\nprojct = "x"', '4: rule "a": unknown key projct: did you mean project?'),
        ('ttl = "1h"\nqqqqqqq = "x"', '4: rule "a": unknown key qqqqqqq: there are id, status, model'),
        ("", '1: rule "a": it needs one of ttl, expires, forever and hold'),
        ('ttl = "1h"\nhold = "x"', '4: rule "a": only one of ttl, expires, forever and hold, not ttl and hold'),
        ("forever = false", '3: rule "a": forever is invalid: it accepts true'),
        ('hold = ""', '3: rule "a": hold is invalid: it accepts a reason'),
        ('expires = "tomorrow"', '3: rule "a": expires is invalid: it accepts an instant with its offset'),
        ("expires = 2026-12-31T00:00:00", '3: rule "a": expires is invalid: it accepts an instant with its offset'),
        ("expires = 10:00:00", '3: rule "a": expires is invalid: it accepts an instant with its offset'),
        ('expires = "2026-02-30"', '3: rule "a": expires is invalid: it accepts an instant with its offset'),
        ('expires = "9999-12-31"', '3: rule "a": expires is invalid: it accepts an instant with its offset'),
        ('status = "FAILD"\nttl = "1h"', '3: rule "a": status is invalid: it accepts COMPLETED, FAILED'),
        ('status = []\nttl = "1h"', '3: rule "a": status is invalid: it accepts COMPLETED, FAILED'),
        ('model = []\nttl = "1h"', '3: rule "a": model is invalid: it accepts a text of 1 to 255 characters'),
        ('model = ""\nttl = "1h"', '3: rule "a": model is invalid: it accepts a text of 1 to 255 characters'),
        ('model = ["ok", "x[0"]\nttl = "1h"', '3: rule "a": model is invalid: it accepts a ] for each ['),
        ('output_duration = 60\nttl = "1h"', '3: rule "a": output_duration is invalid: it accepts ">= 60s"'),
        ('output_duration = ">= 60"\nttl = "1h"', '3: rule "a": output_duration is invalid: it accepts ">= 60s"'),
        ('output_duration = {}\nttl = "1h"', '3: rule "a": output_duration is invalid: it accepts ">= 60s"'),
        ('output_duration = { low = "1s" }\nttl = "1h"', '3: rule "a": output_duration is invalid: it accepts ">='),
        (
            'output_duration = { min = "5m", max = "1m" }\nttl = "1h"',
            '3: rule "a": output_duration is invalid: it accepts bounds that a length can be within',
        ),
        ('output_duration = "< 0s"\nttl = "1h"', '3: rule "a": output_duration is invalid: it accepts bounds'),
        ('labels = "x"\nttl = "1h"', '3: rule "a": labels is invalid: it accepts a table such as'),
        ('ttl = "1h"\n[rule.labels]\n"Ä" = "x"', '4: rule "a": labels is invalid: it accepts names of labels'),
        ('account = "nobody"\nttl = "1h"', '3: rule "a": no account of that name is configured: there is default'),
    ],
)
def test_each_mistake_in_a_rule_is_named_with_its_line(problems_of, text, problem):
    (found,) = problems_of(rule(text))

    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('id = "Big"', "2: account number 1: id is invalid: it accepts 1 to 63 of a-z"),
        ('id = "a/b"', "2: account number 1: id is invalid: it accepts 1 to 63 of a-z"),
        ('rate = "5/second"', "1: account number 1: it needs an id"),
        ('id = "a"\nrate = "5/day"', '3: account "a": rate is invalid: it accepts a number per second'),
        ('id = "a"\nadopt = "mine"', '3: account "a": adopt is invalid: it accepts "ours"'),
        ('id = "a"\nmin_ttl = "0s"', '3: account "a": min_ttl is invalid: it accepts more than zero'),
        ('id = "a"\nmin_ttl = "2h"\nmax_ttl = "1h"', '4: account "a": max_ttl is less than min_ttl'),
        ('id = "a"\napi_key = "x"', '3: account "a": unknown key api_key: did you mean api_key_env?'),
    ],
)
def test_each_mistake_in_an_account_is_named_with_its_line(problems_of, text, problem):
    (found,) = problems_of(f"[[account]]\n{text}\n")

    assert found.startswith(problem)


def forward(text):
    return f'[[forward]]\nid = "crm"\n{text}\n'


URL = 'url = "https://crm.example.com/hooks"'
_A_URL = '3: forward "crm": url is invalid: it accepts an http or https URL'


def test_a_file_has_targets(read):
    (one, two) = read(
        """
        [[account]]
        id = "studio"

        [[forward]]
        id = "crm"
        url = "https://crm.example.com:8443/hooks?token=s3cr3t"

        [[forward]]
        id = "films"
        url = "http://[::1]:9000/"
        statuses = ["COMPLETED", "PROCESSING"]
        accounts = "studio"
        labels.customer = "acme*"
        timeout = "60s"
        concurrency = 100
        secret_env = "FILMS_SECRET"
        required = true
        """
    ).forwards

    assert one.target == Target("crm", Secret("https://crm.example.com:8443/hooks?token=s3cr3t"))
    assert one.secret_env is None
    assert two.secret_env == "FILMS_SECRET"
    assert two.target == Target(
        "films",
        Secret("http://[::1]:9000/"),
        (
            Texts("status", (Pattern.of("COMPLETED"), Pattern.of("PROCESSING"))),
            Texts("account", (Pattern.of("studio"),)),
            Texts("label.customer", (Pattern.of("acme*"),)),
        ),
        timedelta(seconds=60),
        100,
        is_required=True,
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f'{URL}\nsecret = "whsec_x"', '4: forward "crm": unknown key secret: did you mean secret_env?'),
        (f'{URL}\nstatus = "FAILED"', '4: forward "crm": unknown key status: did you mean statuses?'),
        ("", '1: forward "crm": it needs a url: an http or https URL, such as https://'),
        ('url = "ftp://crm.example.com/"', _A_URL),
        ('url = "crm.example.com/hooks"', _A_URL),
        ('url = "https:///hooks"', _A_URL),
        ('url = "https://crm.example.com/#top"', _A_URL),
        ('url = "https://crm.example.com/a b"', _A_URL),
        ('url = "https://crm.example.com/ä"', _A_URL),
        ('url = "https://crm.example.com:0/"', _A_URL),
        ('url = "https://crm.example.com:99999/"', _A_URL),
        ('url = "https://crm.example.com:s3cr3t/"', _A_URL),
        ('url = "https://[::1/"', _A_URL),
        ('url = "https://[s3cr3t]/"', _A_URL),
        ('url = "https://300.1.1.1/"', _A_URL),
        ('url = "https://crm\u2100.example.com/"', _A_URL),
        ('url = "https://us:s3cr3t@crm.example.com/"', f"{_A_URL} without a user and password; use secret_env"),
        ('url = "https://us@crm.example.com/"', f"{_A_URL} without a user and password"),
        (f'url = "https://crm.example.com/{"a" * 2048}"', _A_URL),
        (f'{URL}\ntimeout = "0s"', '4: forward "crm": timeout is invalid: it accepts a duration from 1s to 60s'),
        (f'{URL}\ntimeout = "61s"', '4: forward "crm": timeout is invalid: it accepts a duration from 1s to 60s'),
        (f"{URL}\ntimeout = 5", '4: forward "crm": timeout is invalid: it accepts a duration from 1s to 60s'),
        (f"{URL}\nconcurrency = 0", '4: forward "crm": concurrency is invalid: it accepts a whole number from 1'),
        (f"{URL}\nconcurrency = 101", '4: forward "crm": concurrency is invalid: it accepts a whole number from 1'),
        (f'{URL}\nsecret_env = "whsec_AAAA"', '4: forward "crm": secret_env is invalid: it accepts the name of an'),
        (f'{URL}\nrequired = "yes"', '4: forward "crm": required is invalid: it accepts true or false'),
        (f"{URL}\nstatuses = []", '4: forward "crm": statuses is invalid: it accepts PENDING, PROCESSING, COMPLETED'),
        (f'{URL}\naccounts = "nobody"', '4: forward "crm": no account of that name is configured: there is default'),
        (f'{URL}\nlabels = "x"', '4: forward "crm": labels is invalid: it accepts a table such as'),
    ],
)
def test_each_mistake_in_a_target_is_named_with_its_line(problems_of, text, problem):
    (found,) = problems_of(forward(text))

    assert found.startswith(problem)
    assert "s3cr3t" not in found


def test_a_target_needs_an_id_of_its_own(problems_of):
    assert problems_of(f"[[forward]]\n{URL}\n")[0].startswith("1: forward number 1: it needs an id")
    assert problems_of(f'[[forward]]\nid = "Crm"\n{URL}\n')[0].startswith("2: forward number 1: id is invalid")
    assert problems_of(forward(URL) + forward(URL)) == ['5: forward "crm": duplicate id: the first is in line 2']
    assert problems_of(f'[forward]\nid = "crm"\n{URL}\n')[0].startswith("1: forward is written [[forward]]")


@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_no_url_of_a_target_is_repeated_or_makes_the_reader_fail(text):
    for url in (text, f"https://{text}", f"https://crm.example.com:{text}/", f"https://[{text}]/s3cr3t"):
        try:
            FORWARD_KEYS["url"].parse(url)
        except ValueError as error:
            assert str(error) == "" or str(error).startswith("an http or https URL without a user")  # noqa: PT017


def test_a_secret_that_was_pasted_is_not_repeated(problems_of):
    found = problems_of(
        '[[account]]\nid = "a"\napi_key_env = "sk-12345-secret"\nwebhook_secret_env = ["whsec_secret"]\n'
    )

    assert len(found) == 2
    assert "secret" not in "".join(found).replace("webhook_secret_env", "")


def test_all_problems_are_found_at_once_in_the_order_of_the_lines(problems_of):
    found = problems_of('rles = 1\n[[rule]]\nid = "A"\nttl = 5\nx = 1\n[[rule]]\nttl = "1h"\nid = "b"\nhold = "x"\n')

    assert [problem.partition(":")[0] for problem in found] == ["1", "3", "4", "5", "9"]


def test_a_duplicate_id_names_the_first(problems_of):
    rules = '[[rule]]\nid = "a"\nmodel = "x"\nttl = "1h"\n[[rule]]\nmodel = "y"\nid = "a"\nttl = "1h"\n'

    assert problems_of(rules) == ['7: rule "a": duplicate id: the first is in line 2']
    assert problems_of('[[account]]\nid = "a"\n' * 2) == ['4: account "a": duplicate id: the first is in line 2']


@pytest.mark.parametrize(
    ("first", "second", "is_reached"),
    [
        ("", 'model = "x"', False),
        ('model = "x"', 'model = "x"', False),
        ('model = "x*"', 'model = ["xa", "xb"]', False),
        ('model = "x*"', 'model = "x*"\nproject = "p"', False),
        ('output_duration = ">= 10s"', 'output_duration = "> 10s"', False),
        ('labels = { a = "x*" }', 'labels = { a = "xy", b = "z" }', False),
        ('model = "x"', "", True),
        ('model = "x*"', 'model = ["xa", "yb"]', True),
        ('model = "x"\nproject = "p"', 'model = "x"', True),
        ('output_duration = "> 10s"', 'output_duration = ">= 10s"', True),
        ('labels = { a = "x" }', 'labels = { b = "x" }', True),
        ('model = "x"', 'source = "x"', True),
    ],
)
def test_a_rule_that_is_never_reached_is_refused(read, problems_of, first, second, is_reached):
    text = f'[[rule]]\nid = "a"\nttl = "1h"\n{first}\n[[rule]]\nttl = "2h"\n{second}\nid = "b"\n'
    if is_reached:
        assert len(read(text).rules.rules) == 2
    else:
        (found,) = problems_of(text)
        assert found == '5: rule "b": it is never reached: rule "a" in line 1 matches all that it matches'


def test_a_rule_may_name_a_configured_account_or_the_default_one(read):
    text = '[[account]]\nid = "studio"\n[[rule]]\nid = "a"\naccount = ["stud*", "default"]\nttl = "1h"\n'

    assert len(read(text).rules.rules) == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[rule]\n", "1: not TOML: "),
        ('x = "a\n', "1: not TOML: "),
        ('[[rule]]\nid = "a"\nid = "b"\n', "3: not TOML: "),
        ('[rule]\nid = "a"\n', "1: rule is written [[rule]]"),
        ('[rules]\nid = "a"\n', "1: unknown key rules: did you mean rule?"),
        ("\n\nrule = 5\n", "3: rule is written [[rule]]"),
        ("rule = [5]\n", "1: rule is written [[rule]]"),
    ],
)
def test_a_file_in_another_form_is_refused(problems_of, text, problem):
    (found,) = problems_of(text)

    assert found.startswith(problem)


def test_a_file_that_is_not_utf_8_is_refused(tmp_path):
    path = tmp_path / "mayfly.toml"
    path.write_bytes(b'x = "\xff"')

    with pytest.raises(RulesFileError, match="it is not UTF-8"):
        read_rules_file(path)


# Lines


def test_lines_are_found_whatever_texts_and_comments_look_like():
    text = "\n".join(
        [
            "# [[rule]]",
            "[[rule]]  # [[rule]]",
            'hold = """',
            "[[rule]]",
            'model = 1 \\""" # ',
            '"""',
            "model = '''",
            "[[rule]]'''",
            '  "project" = "x"',
            "[ rule . labels ]",
            'model = "y"',
            "[[rule]]",
            'ttl = "[[rule]]"',
            'labels.x = "y"',
        ]
    )
    lines = TomlLines(text)

    assert [lines.find("rule", place) for place in (0, 1)] == [2, 12]
    assert [lines.find("rule", 0, key) for key in ("hold", "model", "labels", "project")] == [3, 7, 10, 2]
    assert [lines.find("rule", 1, key) for key in ("ttl", "labels", "model")] == [13, 14, 12]


@given(st.text(st.sampled_from("[]#\"'=ab\n\\. ")))
def test_no_text_makes_the_search_for_lines_fail(text):
    assert TomlLines(text).find("rule", 0, "id") >= 1


# The same definition for the reader, the words and the schema


def test_each_key_of_the_shape_has_a_parser_and_no_other():
    assert {one.name for one in msgspec.structs.fields(RuleTable)} == RULE_KEYS.keys()
    assert {one.name for one in msgspec.structs.fields(AccountTable)} == ACCOUNT_KEYS.keys()
    assert {one.name for one in msgspec.structs.fields(ForwardTable)} == FORWARD_KEYS.keys()


def test_the_schema_names_each_key_and_allows_no_other():
    definitions = json.loads(msgspec.json.encode(make_schema()))["$defs"]

    for name, keys in (("RuleTable", RULE_KEYS), ("AccountTable", ACCOUNT_KEYS), ("ForwardTable", FORWARD_KEYS)):
        assert definitions[name]["properties"].keys() == keys.keys()
        assert definitions[name]["additionalProperties"] is False
        assert all(one["description"] for one in definitions[name]["properties"].values())
    assert [one["required"] for one in definitions["ConfigTables"]["properties"]["rule"]["items"]["oneOf"]] == [
        ["ttl"],
        ["expires"],
        ["forever"],
        ["hold"],
    ]


def test_the_example_is_valid_and_reads_as_its_comments_say():
    file = read_rules_file(EXAMPLE)

    assert find_warnings(file, min_ttl=timedelta(minutes=1), now=NOW) == []
    assert [(describe_subject(one), describe_effect(one)) for one in file.rules.rules] == [
        ("status is FAILED or REJECTED", "deleted after 1h"),
        ("project is 612bb64a-e7f4-40c1-977b-3e9797845637", "never deleted"),
        ("label customer like acme*", "held: legal case 2026-14"),
        (
            "model like lipsync-2* or sync-3 and output is at least 60 s",
            "deleted after 1w; its record is kept for 52w",
        ),
        ("output file name like campaign_2030_*", "deleted after 2031-01-01 00:00 UTC"),
    ]


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("expires = 2026-11-22", "expires has passed: what it matches is deleted after MAYFLY_MIN_TTL, 1h"),
        ('ttl = "59m"', "ttl is less than MAYFLY_MIN_TTL: what it matches is kept for 1h"),
        ('input_type = ["video", "vidoe"]\nttl = "1h"', "input_type vidoe may never match"),
        ('status = "COMPLETED"\nerror_code = "x"\nttl = "1h"', "it never matches"),
        ('output_file_name = "film.mp4"\nttl = "1h"', "output_file_name film.mp4 never matches"),
    ],
)
def test_what_is_hardly_meant_is_a_warning_with_its_place(read, text, warning):
    file = read(rule(text))
    (found,) = find_warnings(file, min_ttl=HOUR, now=NOW)

    assert found.startswith(f'{file.path}:1: rule "a": {warning}')


@pytest.mark.parametrize(
    ("text", "warnings"),
    [
        ('url = "https://app.example.com/"', []),
        ('url = "http://app/"', []),
        ('url = "http://10.1.2.3:80/hooks"', []),
        ('url = "http://app.example.com/?token=x"', ["its url is http"]),
        ('url = "https://app/"\nrequired = true', []),
        ('url = "https://app/"\nrequired = true\nstatuses = ["PROCESSING", "FAILED"]', []),
        ('url = "https://app/"\nrequired = true\nstatuses = ["PROCESSING"]', ["required has no effect"]),
    ],
)
def test_a_target_that_is_hardly_meant_is_a_warning_without_its_url(read, text, warnings):
    file = read(f'[[forward]]\nid = "app"\n{text}')
    found = find_warnings(file, min_ttl=HOUR, now=NOW)

    assert len(found) == len(warnings)
    for line, warning in zip(found, warnings, strict=True):
        assert line.startswith(f'{file.path}: forward "app": {warning}')
        assert "token" not in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "every webhook"),
        ('statuses = ["FAILED", "PROCESSING"]', "webhooks whose status is FAILED or PROCESSING"),
        (
            'labels = { customer = "acme*" }\naccounts = "default"',
            "webhooks whose account is default and label customer like acme*",
        ),
    ],
)
def test_what_a_target_gets_is_said_in_words(read, text, words):
    (forward,) = read(f'[[forward]]\nid = "app"\nurl = "https://app/"\n{text}').forwards

    assert describe_webhooks(forward.target) == words
