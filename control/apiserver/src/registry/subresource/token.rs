//! Owns TokenRequest: tokens of a service account, bound to a pod, secret or node if asked for.

use super::super::{Call, options::WriteOptions};
use crate::authn::{BoundObject, Claims};
use crate::body::{Body, Response};
use crate::reply;
use bytes::Bytes;
use http::StatusCode;
use serde_json::{Value, json};
use weft_control_api::field::{FieldError, FieldPath};
use weft_control_api::kinds::Gvk;
use weft_control_api::status::{GroupKind, GroupResource, Status};

/// Bounds of a token's life in seconds, as upstream.
const MIN_SECONDS: i64 = 600;
const MAX_SECONDS: i64 = 1 << 32;
const DEFAULT_SECONDS: i64 = 3600;
/// A pod's token, which its kubelet renews in time, is accepted for longer by upstream; here it is what it says.
const KIND: Gvk<'static> = Gvk { group: "authentication.k8s.io", version: "v1", kind: "TokenRequest" };

pub(super) async fn request(call: &Call, body: Body) -> Result<Response, Status> {
    let options = WriteOptions::of(&call.query)?;
    let body = call.read(body).await?;
    let decoded = call.decode_as(&KIND, &body, options.field_validation)?;
    let mut request = decoded.object;
    let account = call.api.fresh(call.stored(), &call.key()).await?.ok_or_else(|| call.not_found())?;
    let seconds = seconds(call, &request)?;
    let mut audiences: Vec<String> = request["spec"]["audiences"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|v| v.as_str().map(str::to_owned))
        .collect();
    if audiences.is_empty() {
        audiences = call.api.tokens.audiences().to_vec();
    }
    let mut claims = Claims {
        namespace: call.info.namespace.clone(),
        account: BoundObject { name: account.name().to_owned(), uid: account.uid.to_string() },
        audiences: audiences.clone(),
        seconds,
        pod: None,
        node: None,
        secret: None,
    };
    bind(call, &request["spec"]["boundObjectRef"], &mut claims)?;
    let token = call.api.tokens.issue(&claims).map_err(Status::internal)?;
    let expires = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds);
    request["spec"]["audiences"] = json!(audiences);
    request["spec"]["expirationSeconds"] = json!(seconds);
    request["metadata"]["name"] = json!(call.info.name);
    request["metadata"]["namespace"] = json!(call.info.namespace);
    request["metadata"]["creationTimestamp"] = json!(super::super::now());
    request["status"] =
        json!({"token": token, "expirationTimestamp": expires.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()});
    let mut response = reply::json(StatusCode::CREATED, Bytes::from(request.to_string()));
    reply::warn(response.headers_mut(), &decoded.warnings);
    Ok(response)
}

fn seconds(call: &Call, request: &Value) -> Result<i64, Status> {
    let seconds = request["spec"]["expirationSeconds"].as_i64().unwrap_or(DEFAULT_SECONDS);
    let detail = if seconds < MIN_SECONDS {
        "may not specify a duration less than 10 minutes"
    } else if seconds > MAX_SECONDS {
        "may not specify a duration larger than 2^32 seconds"
    } else {
        return Ok(seconds);
    };
    let error = FieldError::invalid(&FieldPath::new("spec.expirationSeconds"), seconds, detail);
    Err(Status::invalid(GroupKind { group: KIND.group, kind: KIND.kind }, &call.info.name, vec![error]))
}

fn bind(call: &Call, reference: &Value, claims: &mut Claims) -> Result<(), Status> {
    if reference.is_null() {
        return Ok(());
    }
    let name = reference["name"].as_str().unwrap_or_default();
    let (plural, namespace) = match reference["kind"].as_str() {
        Some("Pod") => ("pods", call.info.namespace.as_str()),
        Some("Secret") => ("secrets", call.info.namespace.as_str()),
        Some("Node") => ("nodes", ""),
        other => {
            let kind = other.unwrap_or_default();
            return Err(Status::bad_request(format!("cannot bind token to object of type {kind}")));
        }
    };
    let resource = GroupResource { group: "", resource: plural };
    let item =
        call.api.cached("", plural, namespace, name).ok_or_else(|| Status::not_found(resource, name))?;
    let uid = reference["uid"].as_str().unwrap_or_default();
    if !uid.is_empty() && uid != &*item.uid {
        let reason = format!(
            "the UID in the bound object reference ({uid}) does not match the UID in record. The object might \
             have been deleted and then recreated"
        );
        return Err(Status::conflict(resource, name, &reason));
    }
    let object = BoundObject { name: name.to_owned(), uid: item.uid.to_string() };
    match plural {
        "pods" => {
            let pod = item.parse();
            let account = pod["spec"]["serviceAccountName"].as_str().unwrap_or_default();
            if account != call.info.name {
                return Err(Status::bad_request(format!(
                    "cannot bind token for serviceaccount {:?} to pod running with different serviceaccount name.",
                    call.info.name
                )));
            }
            let node = pod["spec"]["nodeName"].as_str().unwrap_or_default();
            claims.node = call
                .api
                .cached("", "nodes", "", node)
                .map(|item| BoundObject { name: node.to_owned(), uid: item.uid.to_string() });
            claims.pod = Some(object);
        }
        "secrets" => claims.secret = Some(object),
        _ => claims.node = Some(object),
    }
    Ok(())
}
