//! Owns the shapes that objects are answered in: themselves, tables, bare metadata.

use super::{Call, convert};
use crate::accept::Shape;
use crate::body::Response;
use crate::reply;
use bytes::Bytes;
use http::StatusCode;
use serde_json::{Value, json};
use weft_control_api::kinds::Kind;
use weft_control_api::status::Status;
use weft_control_api::table;

/// What rows of a table carry of their object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Include {
    None,
    Metadata,
    Object,
}

/// Makes tables for one request.
#[derive(Clone, Debug)]
pub(super) struct Tabler {
    kind: &'static Kind,
    version: &'static str,
    include: Include,
    now: jiff::Timestamp,
}

impl Tabler {
    pub(super) fn new(call: &Call, version: &'static str) -> Result<Self, Status> {
        let include = match call.query.get("includeObject") {
            None | Some("Metadata") => Include::Metadata,
            Some("None") => Include::None,
            Some("Object") => Include::Object,
            Some(other) => {
                return Err(Status::bad_request(format!("unrecognized includeObject value: {other:?}")));
            }
        };
        Ok(Self { kind: call.kind, version, include, now: jiff::Timestamp::now() })
    }

    /// A table of some objects. Watches leave the columns off after the first one.
    pub(super) fn table<'a>(
        &self,
        objects: impl Iterator<Item = &'a Bytes>,
        metadata: &Value,
        with_columns: bool,
    ) -> Bytes {
        let columns: Vec<Value> = table::columns(self.kind).iter().map(table::Column::to_json).collect();
        let rows: Vec<Value> = objects.filter_map(|bytes| self.row(bytes)).collect();
        let mut whole = json!({"kind": "Table", "apiVersion": format!("meta.k8s.io/{}", self.version),
            "metadata": metadata, "columnDefinitions": null, "rows": rows});
        if with_columns {
            whole["columnDefinitions"] = Value::Array(columns);
        }
        Bytes::from(whole.to_string())
    }

    fn row(&self, bytes: &Bytes) -> Option<Value> {
        let object: Value = serde_json::from_slice(bytes).ok()?;
        let mut row = json!({"cells": table::row(self.kind, &object, self.now)});
        let conditions = table::conditions(self.kind, &object);
        if !conditions.is_empty() {
            row["conditions"] = Value::Array(conditions);
        }
        match self.include {
            Include::None => {}
            Include::Metadata => row["object"] = metadata_of(&object, self.version),
            Include::Object => row["object"] = object,
        }
        Some(row)
    }
}

fn metadata_of(object: &Value, version: &str) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": format!("meta.k8s.io/{version}"),
        "metadata": object["metadata"]})
}

/// An object's bare metadata.
pub(super) fn partial(bytes: &Bytes) -> Bytes {
    let object: Value = serde_json::from_slice(bytes).unwrap_or_default();
    Bytes::from(metadata_of(&object, "v1").to_string())
}

/// Answers one object, given in the stored version.
pub(super) fn object(call: &Call, shape: Shape, code: StatusCode, json: Bytes) -> Result<Response, Status> {
    let json = convert::bytes(json, call.stored().storage, call.kind);
    let bytes = match shape {
        Shape::Table(version) => {
            let parsed: Value = serde_json::from_slice(&json).unwrap_or_default();
            let metadata = json!({"resourceVersion": parsed["metadata"]["resourceVersion"]});
            Tabler::new(call, version)?.table(std::iter::once(&json), &metadata, true)
        }
        Shape::Metadata => partial(&json),
        Shape::Object | Shape::Discovery(_) => json,
    };
    Ok(reply::json(code, bytes))
}
