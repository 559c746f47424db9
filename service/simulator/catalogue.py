"""What is the same for everyone: the models and the error codes.

Source: sync.so API reference, "Models API" and "Errors API". Of the catalogue of errors those are here that a client of
generations can meet.
"""

from service.simulator.answers import json_answer
from service.simulator.generation import MODELS as MODEL_NAMES


def _model(name: str) -> dict[str, object]:
    kind, _, version = name.partition("-")
    return {
        "id": name,
        "name": name,
        "type": "react" if kind == "react" else "lipsync",
        "version": version,
        "description": f"{name}, as the simulator has it",
        "deprecatedAt": None,
    }


_ERRORS = {
    "generation_pipeline_failed": "The generation failed while it was processed",
    "generation_unknown_error": "An unknown error occurred.",
    "generation_input_validation_failed": "The request was rejected",
    "generation_input_video_inaccessible": "The provided video URL is inaccessible",
    "generation_input_audio_inaccessible": "The provided audio URL is inaccessible",
    "generation_input_image_inaccessible": "The provided image URL is inaccessible",
    "generation_infra_storage_error": "The output could not be stored",
    "generation_infra_resource_exhausted": "There is no capacity at the moment",
    "generation_infra_service_unavailable": "A service that is needed does not answer",
    "generation_not_deletable_while_processing": "Generation cannot be deleted while processing",
    "generation_not_found": "Generation not found",
    "generation_conflict": "The generation is being changed",
    "invalid_generation_id": "Invalid generation id",
    "unsupported_generation_id_format": "The format of this generation id is not supported",
    "project_not_found": "Project not found",
    "asset_not_found": "Asset not found",
    "asset_forbidden": "The asset belongs to another member",
    "invalid_asset_id_format": "Invalid asset id",
    "controller_timeout": "Controller timed out",
    "controller_unavailable": "Controller unavailable",
    "controller_dependency_error": "A dependency of the controller failed",
    "internal_error": "Internal server error",
    "rate_limit_exceeded": "Rate limit exceeded. Please try again later.",
    "concurrency_limit_reached": "Concurrency limit reached",
    "account_on_hold": "The account is on hold",
    "account_payment_required": "The account needs a payment",
}

MODELS = json_answer(200, [_model(name) for name in MODEL_NAMES])
ERRORS = json_answer(
    200,
    [
        {"code": code, "message": message, "suggestion": "Try again later, or contact support."}
        for code, message in _ERRORS.items()
    ],
)
