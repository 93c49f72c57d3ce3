//! `metav1.Status`: the one error of the API, with upstream's codes, reasons and words.
use std::{borrow::Cow, fmt};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::field::FieldError;

/// A resource's name in messages, such as `deployments.apps`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupResource<'a> {
    /// API group; empty for the core group.
    pub group: &'a str,
    /// Plural name.
    pub resource: &'a str,
}

/// A kind's name in messages, such as `Deployment.apps`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupKind<'a> {
    /// API group; empty for the core group.
    pub group: &'a str,
    /// Name of the type.
    pub kind: &'a str,
}

fn qualified(f: &mut fmt::Formatter<'_>, name: &str, group: &str) -> fmt::Result {
    f.write_str(name)?;
    if group.is_empty() { Ok(()) } else { write!(f, ".{group}") }
}

impl fmt::Display for GroupResource<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        qualified(f, self.resource, self.group)
    }
}

impl fmt::Display for GroupKind<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        qualified(f, self.kind, self.group)
    }
}

/// A `metav1.Status`: why a request failed, or that it succeeded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// `Failure` or `Success`.
    pub status: Cow<'static, str>,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// For programs.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub reason: Cow<'static, str>,
    /// More for programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<Box<Details>>,
    /// HTTP status code; 0 is left out.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub code: u16,
}

/// `metav1.StatusDetails`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Details {
    /// Name of the object.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// API group.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub group: String,
    /// Kind, or resource.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub kind: String,
    /// UID of the object.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// One for each mistake.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<Cause>,
    /// When to try again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_seconds: Option<u32>,
}

/// `metav1.StatusCause`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cause {
    /// For programs.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub reason: Cow<'static, str>,
    /// For people.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Path of the field.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub field: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(code: &u16) -> bool {
    *code == 0
}

/// The object as it goes over the wire.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Wire<'a> {
    kind: &'static str,
    api_version: &'static str,
    metadata: serde_json::Map<String, serde_json::Value>,
    #[serde(flatten)]
    status: &'a Status,
}

impl Details {
    fn resource(resource: GroupResource<'_>, name: &str) -> Self {
        Self {
            name: name.to_owned(),
            group: resource.group.to_owned(),
            kind: resource.resource.to_owned(),
            ..Self::default()
        }
    }

    fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after_seconds = Some(seconds);
        self
    }
}

impl Status {
    /// A failure of any code and reason.
    pub fn failure(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            status: Cow::Borrowed("Failure"),
            message: message.into(),
            reason: Cow::Borrowed(reason),
            details: None,
            code,
        }
    }

    /// Adds details.
    #[must_use]
    pub fn with_details(mut self, details: Details) -> Self {
        self.details = Some(Box::new(details));
        self
    }

    /// What a deletion answers when the object is gone at once.
    pub fn success(resource: GroupResource<'_>, name: &str, uid: &str) -> Self {
        let details = Details { uid: uid.to_owned(), ..Details::resource(resource, name) };
        Self {
            status: Cow::Borrowed("Success"),
            message: String::new(),
            reason: Cow::Borrowed(""),
            details: Some(Box::new(details)),
            code: 0,
        }
    }

    /// 404: there is no such object.
    pub fn not_found(resource: GroupResource<'_>, name: &str) -> Self {
        Self::failure(404, "NotFound", format!("{resource} {name:?} not found"))
            .with_details(Details::resource(resource, name))
    }

    /// 404: there is nothing at that path.
    pub fn unknown_path() -> Self {
        Self::failure(404, "NotFound", "the server could not find the requested resource")
            .with_details(Details::default())
    }

    /// 409: an object of this name is there already.
    pub fn already_exists(resource: GroupResource<'_>, name: &str) -> Self {
        Self::failure(409, "AlreadyExists", format!("{resource} {name:?} already exists"))
            .with_details(Details::resource(resource, name))
    }

    /// 409: every name that was generated is taken.
    pub fn generate_name_conflict(resource: GroupResource<'_>, name: &str) -> Self {
        let message = format!(
            "{resource} {name:?} already exists, the server was not able to generate a unique name for the object"
        );
        Self::failure(409, "AlreadyExists", message)
            .with_details(Details::resource(resource, name).retry_after(1))
    }

    /// 409: somebody changed the object meanwhile, or `reason` forbids the change now.
    pub fn conflict(resource: GroupResource<'_>, name: &str, reason: &str) -> Self {
        let message = format!("Operation cannot be fulfilled on {resource} {name:?}: {reason}");
        Self::failure(409, "Conflict", message).with_details(Details::resource(resource, name))
    }

    /// 409: the resourceVersion that the request names isn't the object's any more.
    pub fn modified(resource: GroupResource<'_>, name: &str) -> Self {
        Self::conflict(
            resource,
            name,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    /// 422: the object has mistakes.
    pub fn invalid(kind: GroupKind<'_>, name: &str, errors: Vec<FieldError>) -> Self {
        let mut messages: Vec<String> = Vec::with_capacity(errors.len());
        let mut causes = Vec::with_capacity(errors.len());
        for error in errors {
            let message = error.to_string();
            if !messages.contains(&message) {
                messages.push(message);
            }
            causes.push(Cause {
                reason: Cow::Borrowed(error.error_type.reason()),
                message: error.body(),
                field: error.field.to_string(),
            });
        }
        let mut message = format!("{kind} {name:?} is invalid");
        match messages.as_slice() {
            [] => {}
            [one] => message.extend([": ", one]),
            several => message.extend([": [", &several.join(", "), "]"]),
        }
        Self::failure(422, "Invalid", message).with_details(Details {
            name: name.to_owned(),
            group: kind.group.to_owned(),
            kind: kind.kind.to_owned(),
            causes,
            ..Details::default()
        })
    }

    /// 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::failure(400, "BadRequest", message)
    }

    /// 403; `name` may be empty.
    pub fn forbidden(resource: GroupResource<'_>, name: &str, reason: &str) -> Self {
        let message = if resource.resource.is_empty() {
            format!("forbidden: {reason}")
        } else if name.is_empty() {
            format!("{resource} is forbidden: {reason}")
        } else {
            format!("{resource} {name:?} is forbidden: {reason}")
        };
        Self::failure(403, "Forbidden", message).with_details(Details::resource(resource, name))
    }

    /// 401.
    pub fn unauthorized() -> Self {
        Self::failure(401, "Unauthorized", "Unauthorized")
    }

    /// 405: the resource is there but can't do that.
    pub fn method_not_supported(resource: GroupResource<'_>, action: &str) -> Self {
        let message = format!("{action} is not supported on resources of kind \"{resource}\"");
        Self::failure(405, "MethodNotAllowed", message).with_details(Details::resource(resource, ""))
    }

    /// 405: the path doesn't take this HTTP method.
    pub fn method_not_allowed() -> Self {
        Self::failure(
            405,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource",
        )
        .with_details(Details::default())
    }

    /// 406; `accepted` are media types.
    pub fn not_acceptable(accepted: &[&str]) -> Self {
        let message = format!("only the following media types are accepted: {}", accepted.join(", "));
        Self::failure(406, "NotAcceptable", message)
    }

    /// 410 with reason `Expired`: the revision, or the continue token, is compacted away.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::failure(410, "Expired", message)
    }

    /// 410 with reason `Gone`.
    pub fn gone(message: impl Into<String>) -> Self {
        Self::failure(410, "Gone", message)
    }

    /// 429.
    pub fn too_many_requests(message: impl Into<String>, retry_after_seconds: u32) -> Self {
        let details = Details::default().retry_after(retry_after_seconds);
        Self::failure(429, "TooManyRequests", message).with_details(details)
    }

    /// 413.
    pub fn request_entity_too_large(limit_bytes: usize) -> Self {
        let message = format!("Request entity too large: limit is {limit_bytes}");
        Self::failure(413, "RequestEntityTooLarge", message)
    }

    /// 415; `accepted` are media types.
    pub fn unsupported_media_type(accepted: &[&str]) -> Self {
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: {}",
            accepted.join(", ")
        );
        Self::failure(415, "UnsupportedMediaType", message)
    }

    /// 500.
    pub fn internal(message: impl fmt::Display) -> Self {
        let cause = Cause { message: message.to_string(), ..Cause::default() };
        Self::failure(500, "InternalError", format!("Internal error occurred: {message}"))
            .with_details(Details { causes: vec![cause], ..Details::default() })
    }

    /// 503.
    pub fn service_unavailable(message: impl Into<String>) -> Self {
        Self::failure(503, "ServiceUnavailable", message)
    }

    /// 504.
    pub fn timeout(message: &str, retry_after_seconds: u32) -> Self {
        let details = Details::default().retry_after(retry_after_seconds);
        Self::failure(504, "Timeout", format!("Timeout: {message}")).with_details(details)
    }

    /// 500 with reason `ServerTimeout`: worth another try.
    pub fn server_timeout(resource: GroupResource<'_>, operation: &str, retry_after_seconds: u32) -> Self {
        let message = format!(
            "The {operation} operation against {resource} could not be completed at this time, please try again."
        );
        Self::failure(500, "ServerTimeout", message)
            .with_details(Details::resource(resource, "").retry_after(retry_after_seconds))
    }

    /// HTTP status code.
    pub fn code(&self) -> u16 {
        if self.code == 0 { 200 } else { self.code }
    }

    /// The object as JSON.
    pub fn to_json(&self) -> Bytes {
        let wire = Wire { kind: "Status", api_version: "v1", metadata: serde_json::Map::new(), status: self };
        Bytes::from(serde_json::to_vec(&wire).expect("a Status has only strings and numbers"))
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Status {}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPLOYMENTS: GroupResource<'static> = GroupResource { group: "apps", resource: "deployments" };

    #[test]
    fn wire_form_is_upstreams() {
        let status = Status::not_found(DEPLOYMENTS, "web");
        assert_eq!(status.code(), 404);
        let expected = r#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"deployments.apps \"web\" not found","reason":"NotFound","details":{"name":"web","group":"apps","kind":"deployments"},"code":404}"#;
        assert_eq!(status.to_json(), expected.as_bytes());
        let read: Status = serde_json::from_slice(&status.to_json()).unwrap();
        assert_eq!(read, status);
    }

    #[test]
    fn invalid_lists_causes() {
        let path = "spec.replicas".into();
        let kind = GroupKind { group: "apps", kind: "Deployment" };
        let one = Status::invalid(kind, "web", vec![FieldError::invalid(&path, -1, "must be non-negative")]);
        assert_eq!(
            one.message,
            r#"Deployment.apps "web" is invalid: spec.replicas: Invalid value: -1: must be non-negative"#
        );
        assert_eq!(one.details.as_ref().unwrap().causes[0].reason, "FieldValueInvalid");
        let two = vec![FieldError::required(&path, ""), FieldError::forbidden(&"spec".into(), "no")];
        assert_eq!(
            Status::invalid(kind, "", two).message,
            r#"Deployment.apps "" is invalid: [spec.replicas: Required value, spec: Forbidden: no]"#
        );
    }

    #[test]
    fn forbidden_names_what_it_can() {
        let none = GroupResource::default();
        assert_eq!(Status::forbidden(none, "", "why").message, "forbidden: why");
        assert_eq!(Status::forbidden(DEPLOYMENTS, "", "why").message, "deployments.apps is forbidden: why");
        assert_eq!(
            Status::forbidden(DEPLOYMENTS, "a", "why").message,
            "deployments.apps \"a\" is forbidden: why"
        );
    }
}
