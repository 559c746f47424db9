"""The simulator's control routes list themselves, are documented, and say which field is wrong."""

import pytest
from click.testing import CliRunner

from service.cli import main
from service.simulator.control import describe_routes
from service.simulator.faults import PARAMETERS, FaultName
from service.simulator.organisation import Switches
from tests.conftest import http_client
from tests.support.readme import REFERENCE, part, rows


@pytest.fixture
async def client(simulator):
    async with http_client(simulator.url) as client:
        yield client


async def test_the_routes_list_themselves_with_a_sentence_each(client):
    listed = (await client.get("/simulator")).json()

    assert listed == dict(describe_routes()) == (await client.get("/simulator/")).json()
    assert all(sentence.endswith(".") for sentence in listed.values())
    assert "POST /simulator/generations" in listed


def test_the_help_of_the_command_names_each_route():
    shown = CliRunner().invoke(main, ["simulate", "--help"]).output

    assert [route for route, _ in describe_routes() if f"  {route}\n" not in shown] == []
    assert "reference.md" in shown


def test_the_reference_names_each_route_switch_and_fault_and_no_other():
    documented = rows(REFERENCE, "The simulator")
    routes = {name.partition("?")[0] for name in documented if " /simulator" in name}
    text = part(REFERENCE, "The simulator")

    assert routes == {route for route, _ in describe_routes()}
    assert documented.keys() >= set(Switches.__struct_fields__) | set(FaultName)
    assert [name for name in PARAMETERS if f"`{name}=" not in text] == []


@pytest.mark.parametrize(
    ("call", "body", "named"),
    [
        ("POST /simulator/generations", [{}, {"colour": "red"}], "[1]: Object contains unknown field `colour`"),
        ("POST /simulator/generations", [{"count": "x"}], "[0].count: Expected `int`"),
        ("POST /simulator/generations", [{"count": 0}], "[0].count: Expected `int` >= 1"),
        ("POST /simulator/generations", [{"created_at": "yesterday"}], "[0].created_at: Invalid RFC3339"),
        ("POST /simulator/generations", [{"status": "DONE"}], "[0]: status must be one of COMPLETED"),
        ("POST /simulator/generations", [{"webhook_url": "not a url"}], "[0]: webhook_url must be a URL"),
        ("POST /simulator/generations", [{"faults": {"REMOVE": ["500"]}}], "[0]: operation 'REMOVE' of a fault"),
        ("POST /simulator/generations", [{"faults": {"GET": ["599"]}}], "[0]: fault '599' is not one of: 409"),
        ("POST /simulator/generations", {}, "Expected `array`, got `object`"),
        ("POST /simulator/faults", [{"operation": "GET"}], "[0]: Object missing required field `faults`"),
        ("POST /simulator/assets", {"kind": "FILM"}, "kind: Invalid enum value 'FILM'"),
        ("POST /simulator/deliver", {"id": "x"}, "unknown field `id`"),
        ("POST /simulator/deliver", {"ids": [7]}, "ids[0]: Expected `str`"),
        ("PUT /simulator/standing", {"GUT": "500"}, "operation 'GUT' of a fault"),
        ("PUT /simulator/mix", {"GET": {"500": "x"}}, "GET: Expected `float`"),
        ("PUT /simulator/standing", {"GET": 5}, "GET: Expected `str | null`"),
        ("PUT /simulator/mix", {"GET": {"500": -1}}, "negative"),
        ("PATCH /simulator/switches", {"outrage": True}, "unknown field `outrage`"),
        ("PATCH /simulator/switches", {"outage": 1}, "outage: Expected `bool`"),
        ("PATCH /simulator/switches", {"endings": ["DONE"]}, "endings[0]: Invalid enum value 'DONE'"),
        ("PATCH /simulator/switches", {"rate": 0}, "rate: Expected `float` > 0"),
        ("GET /simulator/generation", None, "query parameter 'id'"),
        ("GET /simulator/calls?since=x", None, "since: Expected `int`"),
        ("GET /simulator/webhook?id=x&at=now", None, "at: Invalid RFC3339"),
    ],
)
async def test_a_wrong_control_call_says_which_field_is_wrong(simulator, client, call, body, named):
    answer = await client.request(*call.split(), json=body)

    assert answer.status_code == 400
    assert named in answer.json()["detail"]
    assert not simulator.generations


async def test_of_several_generations_all_are_added_or_none(simulator, client):
    answer = await client.post("/simulator/generations", json=[{}, {"faults": {"DELETE": ["500"], "GET": ["x"]}}])

    assert answer.status_code == 400
    assert not simulator.generations


@pytest.mark.parametrize("path", ["/simulator/nowhere", "/simulator/generation/x"])
async def test_an_unknown_route_says_where_the_known_ones_are(client, path):
    answer = await client.get(path)

    assert (answer.status_code, answer.json()["detail"]) == (404, f"no route {path}; GET /simulator lists them")


async def test_an_unknown_generation_is_named(client):
    answer = await client.get("/simulator/generation?id=nobody")

    assert (answer.status_code, answer.json()["detail"]) == (404, "no generation 'nobody'")


async def test_a_generation_can_be_added_with_its_source(simulator, client):
    body = [{"source": "comfyui", "generation_source": None}]
    (id_,) = (await client.post("/simulator/generations", json=body)).json()
    generation = simulator.generations[id_]

    assert (generation.source, generation.generation_source) == ("comfyui", None)
