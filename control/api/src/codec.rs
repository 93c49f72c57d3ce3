//! Decoding of request bodies: JSON and YAML, checked against the schema and brought to canonical form in one pass.
mod syntax;
mod walk;
mod want;

use serde::{Deserialize, de::DeserializeSeed};
use serde_json::Value;

use crate::{
    kinds::{Gvk, Typed},
    schema::{DefinitionId, Schema},
    status::Status,
};
use walk::Walk;

/// The media types whose bodies [`decode`] reads.
pub const MEDIA_TYPES: [&str; 2] = ["application/json", "application/yaml"];

/// As much of a body as a message shows.
const SUMMARY_BYTES: usize = 30;

/// What to do about unknown and duplicate fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FieldValidation {
    /// Drop them.
    Ignore,
    /// Drop them and warn.
    #[default]
    Warn,
    /// Refuse the body.
    Strict,
}

impl FieldValidation {
    /// Reads the query parameter `fieldValidation`.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "" | "Warn" => Some(Self::Warn),
            "Ignore" => Some(Self::Ignore),
            "Strict" => Some(Self::Strict),
            _ => None,
        }
    }
}

/// A body that was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded {
    /// The object, with `apiVersion` and `kind`.
    pub object: Value,
    /// For the `Warning` headers.
    pub warnings: Vec<String>,
}

/// Why a body can't be read.
enum Failure {
    /// It is broken, or has no readable type.
    Unrecognized(String),
    /// A field's value is of the wrong type.
    Mistyped(String),
}

/// Decodes a body that must be of type `kind`.
///
/// Fails with 415 for a media type that isn't one of [`MEDIA_TYPES`], else with 400.
pub fn decode(
    kind: &impl Typed,
    media_type: &str,
    body: &[u8],
    validation: FieldValidation,
) -> Result<Decoded, Status> {
    let definition = definition(kind)?;
    let essence = media_type.split(';').next().unwrap_or_default().trim();
    let yaml = match essence {
        "" | "application/json" => false,
        "application/yaml" => true,
        _ => return Err(Status::unsupported_media_type(&MEDIA_TYPES)),
    };
    let mut walk = Walk::new(Schema::builtin(), validation != FieldValidation::Ignore);
    let read =
        if yaml { read_yaml(&mut walk, definition, body) } else { read_json(&mut walk, definition, body) };
    let expected = kind.type_name();
    match read {
        Ok(object) => finish(expected, definition, object, walk.into_problems(), validation),
        Err(Failure::Unrecognized(message)) => Err(unrecognized(expected, &message, body)),
        Err(Failure::Mistyped(message)) => {
            let meta = if yaml { yaml_meta(body) } else { serde_json::from_slice(body).unwrap_or_default() };
            check_type(expected, definition, meta.gvk(expected))?;
            Err(unfit(meta.gvk(expected), expected.kind, &message))
        }
    }
}

/// Brings an object that didn't come as bytes, such as a patched one, to canonical form.
///
/// Fails with 400.
pub fn decode_value(kind: &impl Typed, value: Value, validation: FieldValidation) -> Result<Decoded, Status> {
    let (definition, expected) = (definition(kind)?, kind.type_name());
    let meta = Meta::of(&value);
    match read_value(definition, value, validation != FieldValidation::Ignore) {
        Ok((object, problems)) => finish(expected, definition, object, problems, validation),
        Err(message) => Err(unfit(meta.gvk(expected), expected.kind, &message)),
    }
}

/// The canonical form of a value and what is unknown in it, or what has the wrong type.
pub(crate) fn read_value(
    definition: DefinitionId,
    value: Value,
    report: bool,
) -> Result<(Value, Vec<String>), String> {
    let mut walk = Walk::new(Schema::builtin(), report);
    match walk.root(definition).deserialize(value) {
        Ok(object) => Ok((object, walk.into_problems())),
        Err(error) => Err(walk.take_mistyped().unwrap_or_else(|| error.to_string())),
    }
}

/// Reads JSON of no schema, such as a patch, and the duplicate fields in it; or says what is wrong with it.
pub(crate) fn read_plain(body: &[u8], report: bool) -> Result<(Value, Vec<String>), String> {
    let mut walk = Walk::new(Schema::builtin(), report);
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let read = walk.plain(&mut deserializer).and_then(|value| {
        deserializer.end()?;
        Ok(value)
    });
    match read {
        Ok(value) => Ok((value, walk.into_problems())),
        Err(error) => Err(syntax::check(body).err().unwrap_or_else(|| error.to_string())),
    }
}

/// Checks that an object's `apiVersion` and `kind`, where it has them, are those of `kind`.
pub(crate) fn check_meta(kind: &impl Typed, object: &Value) -> Result<(), Status> {
    let meta = Meta::of(object);
    check_type(kind.type_name(), definition(kind)?, meta.gvk(kind.type_name()))
}

/// The message for fields that strict validation refuses.
pub(crate) fn strict_message(problems: &[String]) -> String {
    format!("strict decoding error: {}", problems.join(", "))
}

pub(crate) fn definition(kind: &impl Typed) -> Result<DefinitionId, Status> {
    let gvk = kind.type_name();
    kind.definition()
        .ok_or_else(|| Status::internal(format!("{} {} has no schema", gvk.api_version(), gvk.kind)))
}

fn read_json(walk: &mut Walk<'_>, definition: DefinitionId, body: &[u8]) -> Result<Value, Failure> {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let read = walk.root(definition).deserialize(&mut deserializer).and_then(|object| {
        deserializer.end()?;
        Ok(object)
    });
    read.map_err(|error| {
        // Upstream checks the whole text before it looks at any field.
        let broken = syntax::check(body).err();
        let broken = broken.map(|message| format!("couldn't get version/kind; json parse error: {message}"));
        failure(walk, broken, || format!("couldn't get version/kind; json parse error: {error}"))
    })
}

fn read_yaml(walk: &mut Walk<'_>, definition: DefinitionId, body: &[u8]) -> Result<Value, Failure> {
    let text = std::str::from_utf8(body)
        .map_err(|error| Failure::Unrecognized(format!("error converting YAML to JSON: yaml: {error}")))?;
    serde_saphyr::with_deserializer_from_str_with_options(text, yaml_options(), |deserializer| {
        walk.root(definition).deserialize(deserializer)
    })
    .map_err(|error| failure(walk, None, || format!("error converting YAML to JSON: yaml: {error}")))
}

fn yaml_options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::LastWins,
        legacy_octal_numbers: true,
        with_snippet: false,
    }
}

fn failure(walk: &mut Walk<'_>, broken: Option<String>, other: impl FnOnce() -> String) -> Failure {
    match (broken, walk.take_mistyped()) {
        (Some(message), _) => Failure::Unrecognized(message),
        (None, Some(message)) if walk.in_type_name() => {
            Failure::Unrecognized(format!("couldn't get version/kind; json parse error: {message}"))
        }
        (None, Some(message)) => Failure::Mistyped(message),
        (None, None) => Failure::Unrecognized(other()),
    }
}

/// `apiVersion` and `kind` of a body; what is missing is what the request's path says.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Meta {
    api_version: Option<String>,
    kind: Option<String>,
}

impl Meta {
    fn of(value: &Value) -> Self {
        let text = |key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
        Self { api_version: text("apiVersion"), kind: text("kind") }
    }

    fn gvk<'a>(&'a self, expected: Gvk<'a>) -> Gvk<'a> {
        let given = |text: &'a Option<String>| text.as_deref().filter(|text| !text.is_empty());
        let kind = given(&self.kind).unwrap_or(expected.kind);
        match given(&self.api_version) {
            Some(api_version) => Gvk::parse(api_version, kind),
            None => Gvk { kind, ..expected },
        }
    }
}

fn yaml_meta(body: &[u8]) -> Meta {
    serde_saphyr::from_slice_with_options(body, yaml_options()).unwrap_or_default()
}

fn finish(
    expected: Gvk<'_>,
    definition: DefinitionId,
    mut object: Value,
    problems: Vec<String>,
    validation: FieldValidation,
) -> Result<Decoded, Status> {
    let meta = Meta::of(&object);
    let actual = meta.gvk(expected);
    check_type(expected, definition, actual)?;
    if validation == FieldValidation::Strict && !problems.is_empty() {
        return Err(unfit(actual, expected.kind, &strict_message(&problems)));
    }
    if let Some(fields) = object.as_object_mut() {
        fields.insert("apiVersion".to_owned(), actual.api_version().into());
        fields.insert("kind".to_owned(), actual.kind.into());
    }
    Ok(Decoded { object, warnings: problems })
}

fn check_type(expected: Gvk<'_>, definition: DefinitionId, actual: Gvk<'_>) -> Result<(), Status> {
    if actual == expected {
        return Ok(());
    }
    let schema = Schema::builtin();
    let Some(known) = schema.by_gvk(actual.group, actual.version, actual.kind) else {
        let (kind, version) = (actual.kind, actual.api_version());
        let message = format!("no kind {kind:?} is registered for version {version:?} in scheme \"weft\"");
        return Err(unfit(actual, expected.kind, &message));
    };
    if known == definition {
        // A type that every group version has, such as DeleteOptions.
        return Ok(());
    }
    if actual.kind != expected.kind {
        let group = expected.group.split('.').next().filter(|group| !group.is_empty()).unwrap_or("core");
        let (from, to) = (schema.get(known).go_type(), expected.kind);
        let message = format!("converting ({from}) to ({group}.{to}): unknown conversion");
        return Err(unfit(actual, expected.kind, &message));
    }
    Err(Status::bad_request(format!(
        "the API version in the data ({}) does not match the expected API version ({})",
        actual.api_version(),
        expected.api_version()
    )))
}

fn unfit(actual: Gvk<'_>, expected_kind: &str, message: &str) -> Status {
    Status::bad_request(format!(
        "{} in version {:?} cannot be handled as a {expected_kind}: {message}",
        actual.kind, actual.version
    ))
}

fn unrecognized(expected: Gvk<'_>, message: &str, body: &[u8]) -> Status {
    Status::bad_request(format!(
        "the object provided is unrecognized (must be of type {}): {message} ({})",
        expected.kind,
        summary(body)
    ))
}

fn summary(body: &[u8]) -> String {
    let shown = &body[..body.len().min(SUMMARY_BYTES)];
    let dots = if body.len() > SUMMARY_BYTES { " ..." } else { "" };
    match body.first() {
        None => "<empty>".to_owned(),
        Some(b'{') => format!("{}{dots}", String::from_utf8_lossy(shown)),
        Some(_) => {
            let hex: String = shown.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{hex}{dots}")
        }
    }
}

#[cfg(test)]
mod tests;
