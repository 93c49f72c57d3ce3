//! Owns what can be done with a part of an object, or through it.

mod kubelet;
mod pods;
mod proxy;
mod token;

pub(crate) use pods::bind;

use super::options::WriteOptions;
use super::update::{Change, update_object};
use super::{Call, get, patch_type, update};
use crate::body::{Body, Response};
use crate::reply;
use bytes::Bytes;
use http::{Method, StatusCode};
use serde_json::Value;
use weft_control_api::kinds::Gvk;
use weft_control_api::status::Status;
use weft_control_api::{patch as patching, strategy};

const SCALE: Gvk<'static> = Gvk { group: "autoscaling", version: "v1", kind: "Scale" };

/// Answers a request for a subresource.
pub(super) async fn answer(call: Call, body: Body) -> Result<Response, Status> {
    let name = call.info.subresource.clone();
    let method = call.head.method.clone();
    if call.kind.subresource(&name).is_none() {
        return Err(Status::unknown_path());
    }
    if call.info.name.contains('/') || (call.kind.namespaced && call.info.namespace.is_empty()) {
        return Err(call.not_found());
    }
    match (call.kind.plural, name.as_str(), method) {
        ("pods", "log", Method::GET) => kubelet::log(&call).await,
        ("pods", "exec" | "attach" | "portforward", Method::GET | Method::POST) => {
            kubelet::stream(&call).await
        }
        ("pods", "binding", Method::POST) => {
            let options = WriteOptions::of(&call.query)?;
            let body = call.read(body).await?;
            let binding = Gvk { group: "", version: "v1", kind: "Binding" };
            let decoded = call.decode_as(&binding, &body, options.field_validation)?;
            pods::bind(&call, &decoded.object, &options).await
        }
        ("pods" | "services" | "nodes", "proxy", _) => proxy::answer(&call, body).await,
        ("pods", "eviction", Method::POST) => pods::evict(&call, body).await,
        ("serviceaccounts", "token", Method::POST) => token::request(&call, body).await,
        (_, "scale", Method::GET) => scale_get(&call).await,
        (_, "scale", Method::PUT | Method::PATCH) => scale_set(&call, body).await,
        ("namespaces", "finalize", Method::PUT)
        | (_, "status" | "resize" | "ephemeralcontainers" | "approval", Method::PUT) => {
            update::put(&call, body).await
        }
        (_, "status" | "resize" | "ephemeralcontainers" | "approval", Method::PATCH) => {
            update::patch(&call, body).await
        }
        (_, "status" | "resize" | "ephemeralcontainers" | "approval", Method::GET) => get(&call).await,
        _ => Err(Status::method_not_allowed()),
    }
}

async fn scale_get(call: &Call) -> Result<Response, Status> {
    let item = call.api.fresh(call.stored(), &call.key()).await?.ok_or_else(|| call.not_found())?;
    let scale = strategy::scale_get(call.stored().storage, &item.parse());
    Ok(reply::json(StatusCode::OK, Bytes::from(scale.to_string())))
}

async fn scale_set(call: &Call, body: Body) -> Result<Response, Status> {
    let options = WriteOptions::of(&call.query)?;
    let is_patch = call.head.method == Method::PATCH;
    let patch_type = if is_patch { Some(patch_type(call.content_type())?) } else { None };
    let body = call.read(body).await?;
    let change = Change {
        kind: call.kind,
        namespace: &call.info.namespace,
        name: &call.info.name,
        subresource: "scale",
        dry_run: options.dry_run,
    };
    let mut warnings = Vec::new();
    let written = update_object(&call.api, &call.user, &change, |old| {
        let decoded = match patch_type {
            Some(kind) => {
                let before = strategy::scale_get(call.kind, old);
                patching::apply_and_decode(&SCALE, kind, &before, &body, options.field_validation)?
            }
            None => call.decode_as(&SCALE, &body, options.field_validation)?,
        };
        warnings = decoded.warnings;
        call.check_path(&decoded.object)?;
        if decoded.object["spec"]["replicas"].as_i64().unwrap_or(0) < 0 {
            return Err(negative_replicas(call, &decoded.object));
        }
        let mut new = old.clone();
        strategy::scale_set(call.kind, &mut new, &decoded.object);
        Ok(new)
    })
    .await?;
    let object: Value = serde_json::from_slice(&written.json).map_err(Status::internal)?;
    let scale = strategy::scale_get(call.stored().storage, &object);
    let mut response = reply::json(StatusCode::OK, Bytes::from(scale.to_string()));
    reply::warn(response.headers_mut(), &warnings);
    Ok(response)
}

fn negative_replicas(call: &Call, scale: &Value) -> Status {
    use weft_control_api::field::{FieldError, FieldPath};
    let value = scale["spec"]["replicas"].clone();
    let path = FieldPath::new("spec.replicas");
    let error = FieldError::invalid(&path, value, "must be greater than or equal to 0");
    let kind = weft_control_api::status::GroupKind { group: SCALE.group, kind: SCALE.kind };
    Status::invalid(kind, &call.info.name, vec![error])
}
