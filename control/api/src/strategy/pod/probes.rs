//! Validation of probes and lifecycle hooks.

use serde_json::Value;

use super::super::checks::{Errors, not_negative, one_of, port_number, port_reference, problems, required};
use super::super::value::{items, text};
use crate::field::{FieldError, FieldPath};
use crate::names;

const HANDLERS: [&str; 5] = ["exec", "httpGet", "tcpSocket", "grpc", "sleep"];

/// A probe that is there.
pub(super) fn validate(errors: &mut Errors, path: &FieldPath, probe: &Value) {
    handler(errors, path, probe);
    for field in
        ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"]
    {
        not_negative(errors, &path.child(field), &probe[field]);
    }
    if let Some(grace) = probe["terminationGracePeriodSeconds"].as_i64().filter(|grace| *grace <= 0) {
        let path = path.child("terminationGracePeriodSeconds");
        errors.push(FieldError::invalid(&path, grace, "must be greater than 0"));
    }
}

/// What a probe or hook does: exactly one thing.
pub(super) fn handler(errors: &mut Errors, path: &FieldPath, handler: &Value) {
    let mut given = HANDLERS.into_iter().filter(|kind| !handler[*kind].is_null());
    let Some(first) = given.next() else {
        errors.push(FieldError::required(path, "must specify a handler type"));
        return;
    };
    action(errors, &path.child(first), first, &handler[first]);
    for more in given {
        errors.push(FieldError::forbidden(&path.child(more), "may not specify more than 1 handler type"));
    }
}

fn action(errors: &mut Errors, path: &FieldPath, kind: &str, action: &Value) {
    match kind {
        "exec" => {
            required(errors, &path.child("command"), &action["command"]);
        }
        "httpGet" => {
            required(errors, &path.child("path"), &action["path"]);
            port_reference(errors, &path.child("port"), &action["port"]);
            one_of(errors, &path.child("scheme"), &action["scheme"], &["HTTP", "HTTPS"]);
            for header in items(&action["httpHeaders"]) {
                let name = text(&header["name"]);
                problems(errors, &path.child("httpHeaders"), name, names::http_header_name(name));
            }
        }
        "tcpSocket" => port_reference(errors, &path.child("port"), &action["port"]),
        "grpc" => port_number(errors, &path.child("port"), &action["port"]),
        _ => {
            if let Some(seconds) = action["seconds"].as_i64().filter(|seconds| *seconds < 0) {
                let detail = "must be non-negative";
                errors.push(FieldError::invalid(&path.child("seconds"), seconds, detail));
            }
        }
    }
}
