//! Paths to fields and what is wrong with their values, in upstream's words.
use std::fmt::{self, Write as _};

use serde_json::Value;

/// Where a field is, such as `spec.containers[0].name`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldPath(String);

impl FieldPath {
    /// A path that begins with `name`; an empty one is the object itself.
    pub fn new(name: &str) -> Self {
        Self(name.to_owned())
    }

    /// A field of the object at this path. `name` may be a path of several.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        let mut path = self.0.clone();
        if !path.is_empty() && !name.is_empty() {
            path.push('.');
        }
        path.push_str(name);
        Self(path)
    }

    /// An item of the list at this path.
    #[must_use]
    pub fn index(&self, at: usize) -> Self {
        Self(format!("{}[{at}]", self.0))
    }

    /// An entry of the map at this path.
    #[must_use]
    pub fn key(&self, key: &str) -> Self {
        Self(format!("{}[{key}]", self.0))
    }

    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for FieldPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Upstream prints the nil path so.
        f.write_str(if self.0.is_empty() { "<nil>" } else { &self.0 })
    }
}

impl From<&str> for FieldPath {
    fn from(path: &str) -> Self {
        Self::new(path)
    }
}

/// What kind of mistake a [`FieldError`] reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FieldErrorType {
    /// A value that must be there isn't.
    Required,
    /// A malformed or unfit value.
    Invalid,
    /// A value outside the list of known ones.
    NotSupported,
    /// A well-formed value that is not allowed here or now.
    Forbidden,
    /// A value that must be unique isn't.
    Duplicate,
    /// Too many bytes.
    TooLong,
    /// Too many items.
    TooMany,
    /// A reference to what isn't there.
    NotFound,
    /// A value of the wrong type.
    TypeInvalid,
    /// The server's own mistake.
    Internal,
}

impl FieldErrorType {
    /// The word for `metav1.StatusCause.reason`.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Required => "FieldValueRequired",
            Self::Invalid => "FieldValueInvalid",
            Self::NotSupported => "FieldValueNotSupported",
            Self::Forbidden => "FieldValueForbidden",
            Self::Duplicate => "FieldValueDuplicate",
            Self::TooLong => "FieldValueTooLong",
            Self::TooMany => "FieldValueTooMany",
            Self::NotFound => "FieldValueNotFound",
            Self::TypeInvalid => "FieldValueTypeInvalid",
            Self::Internal => "InternalError",
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::Required => "Required value",
            Self::Invalid | Self::TypeInvalid => "Invalid value",
            Self::NotSupported => "Unsupported value",
            Self::Forbidden => "Forbidden",
            Self::Duplicate => "Duplicate value",
            Self::TooLong => "Too long",
            Self::TooMany => "Too many",
            Self::NotFound => "Not found",
            Self::Internal => "Internal error",
        }
    }
}

/// One mistake in one field.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldError {
    /// What kind of mistake.
    pub error_type: FieldErrorType,
    /// Where.
    pub field: FieldPath,
    /// The value, for the types whose message shows it.
    pub value: Value,
    /// What would be right; may be empty.
    pub detail: String,
}

impl FieldError {
    fn make(error_type: FieldErrorType, field: &FieldPath, value: Value, detail: impl Into<String>) -> Self {
        Self { error_type, field: field.clone(), value, detail: detail.into() }
    }

    /// A value that must be there isn't.
    pub fn required(field: &FieldPath, detail: impl Into<String>) -> Self {
        Self::make(FieldErrorType::Required, field, Value::String(String::new()), detail)
    }

    /// A malformed or unfit value.
    pub fn invalid(field: &FieldPath, value: impl Into<Value>, detail: impl Into<String>) -> Self {
        Self::make(FieldErrorType::Invalid, field, value.into(), detail)
    }

    /// A value of the wrong type.
    pub fn type_invalid(field: &FieldPath, value: impl Into<Value>, detail: impl Into<String>) -> Self {
        Self::make(FieldErrorType::TypeInvalid, field, value.into(), detail)
    }

    /// A value outside the list of known ones.
    pub fn not_supported(field: &FieldPath, value: impl Into<Value>, supported: &[&str]) -> Self {
        let mut detail = String::new();
        for value in supported {
            detail.push_str(if detail.is_empty() { "supported values: " } else { ", " });
            // Writing to a string can't fail.
            let _ = write!(detail, "{value:?}");
        }
        Self::make(FieldErrorType::NotSupported, field, value.into(), detail)
    }

    /// A well-formed value that is not allowed here or now.
    pub fn forbidden(field: &FieldPath, detail: impl Into<String>) -> Self {
        Self::make(FieldErrorType::Forbidden, field, Value::String(String::new()), detail)
    }

    /// A value that must be unique isn't.
    pub fn duplicate(field: &FieldPath, value: impl Into<Value>) -> Self {
        Self::make(FieldErrorType::Duplicate, field, value.into(), "")
    }

    /// A reference to what isn't there.
    pub fn not_found(field: &FieldPath, value: impl Into<Value>) -> Self {
        Self::make(FieldErrorType::NotFound, field, value.into(), "")
    }

    /// More bytes than `max_bytes`.
    pub fn too_long(field: &FieldPath, max_bytes: usize) -> Self {
        let detail = format!("may not be more than {max_bytes} bytes");
        Self::make(FieldErrorType::TooLong, field, Value::String(String::new()), detail)
    }

    /// More items than `max`.
    pub fn too_many(field: &FieldPath, actual: usize, max: usize) -> Self {
        Self::make(FieldErrorType::TooMany, field, actual.into(), format!("must have at most {max} items"))
    }

    /// The server's own mistake.
    pub fn internal(field: &FieldPath, detail: impl Into<String>) -> Self {
        Self::make(FieldErrorType::Internal, field, Value::Null, detail)
    }

    /// The message without the path.
    pub fn body(&self) -> String {
        let text = self.error_type.text();
        let mut body = match self.error_type {
            FieldErrorType::Required
            | FieldErrorType::Forbidden
            | FieldErrorType::TooLong
            | FieldErrorType::Internal => text.to_owned(),
            FieldErrorType::Invalid
            | FieldErrorType::NotSupported
            | FieldErrorType::Duplicate
            | FieldErrorType::TooMany
            | FieldErrorType::NotFound
            | FieldErrorType::TypeInvalid => match &self.value {
                Value::Null => format!("{text}: \"null\""),
                Value::String(value) => format!("{text}: {value:?}"),
                value @ (Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_)) => {
                    format!("{text}: {value}")
                }
            },
        };
        if !self.detail.is_empty() {
            body.push_str(": ");
            body.push_str(&self.detail);
        }
        body
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.body())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_upstreams() {
        let path = FieldPath::new("spec").child("containers").index(0);
        let text = |error: FieldError| error.to_string();
        assert_eq!(
            text(FieldError::required(&path.child("name"), "")),
            "spec.containers[0].name: Required value"
        );
        assert_eq!(
            text(FieldError::invalid(
                &path.child("ports").index(2).child("containerPort"),
                70000,
                "must be small"
            )),
            "spec.containers[0].ports[2].containerPort: Invalid value: 70000: must be small"
        );
        assert_eq!(
            text(FieldError::not_supported(&"spec.type".into(), "Foo", &["ClusterIP", "NodePort"])),
            r#"spec.type: Unsupported value: "Foo": supported values: "ClusterIP", "NodePort""#
        );
        assert_eq!(
            text(FieldError::too_many(&"spec.list".into(), 5, 3)),
            "spec.list: Too many: 5: must have at most 3 items"
        );
        assert_eq!(
            text(FieldError::duplicate(&FieldPath::new("metadata.labels").key("a/b"), "x")),
            r#"metadata.labels[a/b]: Duplicate value: "x""#
        );
        assert_eq!(text(FieldError::forbidden(&"spec".into(), "no")), "spec: Forbidden: no");
    }
}
