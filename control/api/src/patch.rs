//! Patches: JSON patch (RFC 6902), JSON merge patch (RFC 7386) and strategic merge patch.
mod strategic;

use json_patch::PatchOperation;
use serde_json::Value;

use crate::{
    codec::{self, Decoded, FieldValidation},
    field::{FieldError, FieldPath},
    kinds::Typed,
    schema::Schema,
    status::{Details, GroupKind, Status},
};

/// Most operations of a JSON patch; as upstream.
const MAX_JSON_PATCH_OPERATIONS: usize = 10_000;

/// The media types of patches.
pub const MEDIA_TYPES: [&str; 3] =
    ["application/json-patch+json", "application/merge-patch+json", "application/strategic-merge-patch+json"];

/// How a patch is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatchType {
    /// A list of operations.
    Json,
    /// An object whose fields replace the target's; null removes.
    Merge,
    /// Like a merge patch, but lists are merged as the schema says.
    Strategic,
}

impl PatchType {
    /// Reads a `Content-Type`.
    pub fn from_media_type(media_type: &str) -> Option<Self> {
        match media_type.split(';').next().unwrap_or_default().trim() {
            "application/json-patch+json" => Some(Self::Json),
            "application/merge-patch+json" => Some(Self::Merge),
            "application/strategic-merge-patch+json" => Some(Self::Strategic),
            _ => None,
        }
    }
}

/// Applies a patch. The result is not yet checked against the schema; [`apply_and_decode`] does both.
///
/// Fails with 400 for a patch that can't be read, with 422 for one that doesn't apply.
pub fn apply(
    kind: &impl Typed,
    patch_type: PatchType,
    current: &Value,
    patch: &[u8],
) -> Result<Value, Status> {
    let (patch, _) = codec::read_plain(patch, false).map_err(Status::bad_request)?;
    apply_value(kind, patch_type, current, patch)
}

/// Applies a patch and brings the result to canonical form.
///
/// Fails as [`apply`], and with 422 if the result has wrong types or, under strict validation, unknown fields.
pub fn apply_and_decode(
    kind: &impl Typed,
    patch_type: PatchType,
    current: &Value,
    patch: &[u8],
    validation: FieldValidation,
) -> Result<Decoded, Status> {
    let definition = codec::definition(kind)?;
    let report = validation != FieldValidation::Ignore;
    let (patch_value, mut problems) = codec::read_plain(patch, report).map_err(Status::bad_request)?;
    let shown = match patch_type {
        PatchType::Json | PatchType::Merge => String::from_utf8_lossy(patch).into_owned(),
        PatchType::Strategic => go_text(&patch_value),
    };
    let invalid = |message: String| {
        let error = FieldError::invalid(&FieldPath::new("patch"), shown, message);
        Status::invalid(GroupKind::default(), "", vec![error])
    };
    let patched = apply_value(kind, patch_type, current, patch_value)?;
    codec::check_meta(kind, &patched)?;
    let (object, unknown) = match codec::read_value(definition, patched, report) {
        Ok(read) => read,
        Err(message) => return Err(invalid(message)),
    };
    problems.extend(unknown);
    if validation == FieldValidation::Strict && !problems.is_empty() {
        return Err(invalid(codec::strict_message(&problems)));
    }
    Ok(Decoded { object, warnings: problems })
}

fn apply_value(
    kind: &impl Typed,
    patch_type: PatchType,
    current: &Value,
    patch: Value,
) -> Result<Value, Status> {
    match patch_type {
        PatchType::Json => json(current, patch),
        PatchType::Merge => {
            let mut patched = current.clone();
            json_patch::merge(&mut patched, &patch);
            Ok(patched)
        }
        PatchType::Strategic => {
            let (Value::Object(patch), Value::Object(current)) = (patch, current) else {
                return Err(Status::bad_request("a strategic merge patch must be a JSON object"));
            };
            let merged =
                strategic::apply(Schema::builtin(), codec::definition(kind)?, current.clone(), patch)?;
            Ok(Value::Object(merged))
        }
    }
}

fn json(current: &Value, patch: Value) -> Result<Value, Status> {
    let Value::Array(operations) = &patch else {
        return Err(Status::bad_request("a JSON patch must be a list of operations"));
    };
    if operations.len() > MAX_JSON_PATCH_OPERATIONS {
        let message = format!(
            "The allowed maximum operations in a JSON patch is {MAX_JSON_PATCH_OPERATIONS}, got {}",
            operations.len()
        );
        return Err(Status::failure(413, "RequestEntityTooLarge", message));
    }
    let Ok(operations) = serde_json::from_value::<Vec<PatchOperation>>(patch) else { return Err(rejected()) };
    let mut patched = current.clone();
    match json_patch::patch(&mut patched, &operations) {
        Ok(()) => Ok(patched),
        Err(_) => Err(rejected()),
    }
}

/// A patch that is well formed but can't be applied; upstream doesn't say why either.
fn rejected() -> Status {
    Status::failure(422, "Invalid", "the server rejected our request due to an error in our request")
        .with_details(Details::default())
}

/// A value as Go's `%v` prints it.
fn go_text(value: &Value) -> String {
    match value {
        Value::Null => "<nil>".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) => format!("[{}]", items.iter().map(go_text).collect::<Vec<_>>().join(" ")),
        Value::Object(fields) => {
            let fields: Vec<String> =
                fields.iter().map(|(key, value)| format!("{key}:{}", go_text(value))).collect();
            format!("map[{}]", fields.join(" "))
        }
        Value::Bool(_) | Value::Number(_) => value.to_string(),
    }
}

#[cfg(test)]
mod tests;
