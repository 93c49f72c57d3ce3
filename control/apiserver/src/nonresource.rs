//! Owns the paths that name no resource: health, version, metrics, discovery, OpenAPI, token issuer.

use crate::accept::{self, Shape};
use crate::api::Api;
use crate::body::Response;
use crate::reply;
use crate::request_info::{Query, RequestInfo};
use bytes::Bytes;
use http::request::Parts;
use http::{HeaderValue, Method, StatusCode};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use weft_control_api::discovery::{self, Aggregated};
use weft_control_api::kinds::served;
use weft_control_api::openapi;
use weft_control_api::status::Status;

/// The version of Kubernetes whose API this is.
const GIT_VERSION: &str = "v1.36.2+weft";
/// How long the store may take to answer a health check.
const STORE_TIMEOUT: Duration = Duration::from_secs(2);
/// Prometheus' text format.
const METRICS_TYPE: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

/// Answers a request that names no resource.
pub(crate) async fn answer(
    api: &Arc<Api>,
    info: &RequestInfo,
    query: &Query,
    head: &Parts,
) -> Result<Response, Status> {
    if !matches!(head.method, Method::GET | Method::HEAD) {
        return Err(Status::method_not_allowed());
    }
    let path = info.path.trim_end_matches('/');
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    match parts.as_slice() {
        [""] => Ok(value(&json!({"paths": paths()}))),
        ["healthz" | "livez" | "readyz", check @ ..] if check.len() <= 1 => {
            Ok(health(api, parts[0], check.first().copied(), query).await)
        }
        ["version"] => Ok(value(&version())),
        ["metrics"] => metrics(api),
        ["api" | "apis"] => discovery_root(api, head, parts[0]),
        ["api", version] => document(discovery::resource_list(served(), "", version)),
        ["apis", group] => document(discovery::group(served(), group)),
        ["apis", group, version] => document(discovery::resource_list(served(), group, version)),
        ["openapi", "v2"] => openapi_v2(head),
        ["openapi", "v3"] => Ok(value(&openapi::index(served()))),
        ["openapi", "v3", rest @ ..] => openapi_document(rest, head, query),
        [".well-known", "openid-configuration"] => Ok(value(&json!({
            "issuer": api.tokens.issuer(),
            "jwks_uri": format!("https://{}:{}/openid/v1/jwks", api.config.advertise_address, api.config.advertise_port),
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["ES256"],
        }))),
        ["openid", "v1", "jwks"] => Ok(value(&api.tokens.keys().jwks())),
        _ => Ok(reply::text(StatusCode::NOT_FOUND, "404 page not found\n")),
    }
}

fn value(value: &Value) -> Response {
    reply::json(StatusCode::OK, Bytes::from(value.to_string()))
}

fn document(found: Option<Value>) -> Result<Response, Status> {
    match found {
        Some(found) => Ok(value(&found)),
        None => Ok(reply::text(StatusCode::NOT_FOUND, "404 page not found\n")),
    }
}

fn discovery_root(api: &Api, head: &Parts, root: &str) -> Result<Response, Status> {
    let shape =
        accept::negotiate(&head.headers, |shape| matches!(shape, Shape::Object | Shape::Discovery(_)))?;
    let core = root == "api";
    let Shape::Discovery(version) = shape else {
        let address = format!("{}:{}", api.config.advertise_address, api.config.advertise_port);
        let whole = if core { discovery::core_versions(&address) } else { discovery::group_list(served()) };
        return Ok(value(&whole));
    };
    let form = if version == "v2" { Aggregated::V2 } else { Aggregated::V2Beta1 };
    let mut response = value(&discovery::aggregated(served(), core, form));
    response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static(form.content_type()));
    response.headers_mut().insert(http::header::VARY, HeaderValue::from_static("Accept"));
    Ok(response)
}

/// Everything in one document, as JSON or as the protobuf that client-go asks for.
fn openapi_v2(head: &Parts) -> Result<Response, Status> {
    let accepted: Vec<&str> = head
        .headers
        .get_all(http::header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|clause| clause.split(';').next().unwrap_or_default().trim())
        .filter(|media_type| !media_type.is_empty())
        .collect();
    let protobuf = |media_type: &str| openapi::gnostic::MEDIA_TYPES.contains(&media_type);
    let json = |media_type: &str| matches!(media_type, "application/json" | "application/*" | "*/*");
    let first = accepted.iter().copied().find(|media_type| protobuf(media_type) || json(media_type));
    if first.is_none() && !accepted.is_empty() {
        return Err(Status::not_acceptable(&["application/json", openapi::gnostic::MEDIA_TYPES[1]]));
    }
    let tag = format!("\"{}\"", openapi::hash());
    let known =
        head.headers.get(http::header::IF_NONE_MATCH).is_some_and(|value| value.as_bytes() == tag.as_bytes());
    let mut response = if known {
        let mut response = reply::text(StatusCode::NOT_MODIFIED, "");
        response.headers_mut().remove(http::header::CONTENT_TYPE);
        response
    } else {
        let document = openapi::v2::document(served());
        let binary = first.is_some_and(protobuf);
        let bytes =
            if binary { openapi::gnostic::encode(&document) } else { document.to_string().into_bytes() };
        let mut response = reply::json_pieces(vec![Bytes::from(bytes)], accept::takes_gzip(&head.headers));
        if binary {
            let media_type = HeaderValue::from_static(openapi::gnostic::MEDIA_TYPES[1]);
            response.headers_mut().insert(http::header::CONTENT_TYPE, media_type);
        }
        response
    };
    response.headers_mut().append(http::header::VARY, HeaderValue::from_static("Accept"));
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        response.headers_mut().insert(http::header::ETAG, tag);
    }
    Ok(response)
}

fn openapi_document(rest: &[&str], head: &Parts, query: &Query) -> Result<Response, Status> {
    let found = match rest {
        ["api", version] => openapi::document(served(), "", version),
        ["apis", group, version] => openapi::document(served(), group, version),
        _ => None,
    };
    let Some(found) = found else { return document(None) };
    let pieces = vec![Bytes::from(found.to_string())];
    let mut response = reply::json_pieces(pieces, accept::takes_gzip(&head.headers));
    // The index names the document by its hash, so clients may keep it.
    if query.get("hash") == Some(openapi::hash())
        && let Ok(tag) = HeaderValue::from_str(&format!("\"{}\"", openapi::hash()))
    {
        response.headers_mut().insert(http::header::ETAG, tag);
        response
            .headers_mut()
            .insert(http::header::CACHE_CONTROL, HeaderValue::from_static("public, immutable"));
    }
    Ok(response)
}

fn paths() -> Vec<String> {
    let mut paths: Vec<String> = [
        "/.well-known/openid-configuration",
        "/api",
        "/apis",
        "/healthz",
        "/livez",
        "/metrics",
        "/openapi/v2",
        "/openapi/v3",
        "/openid/v1/jwks",
        "/readyz",
        "/version",
    ]
    .map(str::to_owned)
    .to_vec();
    for kind in served() {
        let path = if kind.group.is_empty() {
            format!("/api/{}", kind.version)
        } else {
            format!("/apis/{}/{}", kind.group, kind.version)
        };
        if !paths.contains(&path) {
            paths.push(path);
        }
    }
    paths.sort();
    paths
}

fn version() -> Value {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    json!({"major": "1", "minor": "36", "emulationMajor": "1", "emulationMinor": "36",
        "minCompatibilityMajor": "1", "minCompatibilityMinor": "35", "gitVersion": GIT_VERSION,
        "gitCommit": "", "gitTreeState": "clean", "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "", "compiler": "rustc", "platform": format!("linux/{architecture}")})
}

fn metrics(api: &Api) -> Result<Response, Status> {
    for resource in api.resources.all() {
        let name = resource.storage.group_resource().to_string();
        api.metrics.set_objects(name, api.cache.count(resource.id));
    }
    api.metrics.set_ranges(&crate::alloc::usage(api));
    let text = api.metrics.encode().map_err(Status::internal)?;
    let mut response = reply::text(StatusCode::OK, text);
    response.headers_mut().insert(http::header::CONTENT_TYPE, METRICS_TYPE);
    Ok(response)
}

/// One health check: its name and whether it passed.
type Check = (&'static str, bool);

async fn checks(api: &Api, endpoint: &str) -> Vec<Check> {
    let store = tokio::time::timeout(STORE_TIMEOUT, api.store.current_revision()).await;
    let store = matches!(store, Ok(Ok(_)));
    let bootstrapped = api.bootstrapped.load(Ordering::Acquire);
    let mut checks = vec![("ping", true), ("log", true)];
    if endpoint != "livez" {
        checks.push(("etcd", store));
    }
    if endpoint == "readyz" {
        checks.push(("etcd-readiness", store));
        checks.push(("informer-sync", api.cache.revision() > 0 || bootstrapped));
    }
    checks.push(("poststarthook/start-apiserver-admission-initializer", true));
    checks.push(("poststarthook/rbac/bootstrap-roles", bootstrapped));
    checks.push(("poststarthook/scheduling/bootstrap-system-priority-classes", bootstrapped));
    checks.push(("poststarthook/bootstrap-controller", bootstrapped));
    if endpoint == "readyz" {
        checks.push(("shutdown", !api.closing.is_cancelled()));
    }
    checks
}

async fn health(api: &Api, endpoint: &str, one: Option<&str>, query: &Query) -> Response {
    let mut checks = checks(api, endpoint).await;
    if let Some(one) = one {
        checks.retain(|(name, _)| *name == one);
        if checks.is_empty() {
            return reply::text(StatusCode::NOT_FOUND, "404 page not found\n");
        }
    }
    let excluded = query.all("exclude");
    let mut report = String::new();
    let mut failed = Vec::new();
    for (name, passed) in &checks {
        if excluded.iter().any(|e| e == name) {
            report.push_str(&format!("[+]{name} excluded: ok\n"));
        } else if *passed {
            report.push_str(&format!("[+]{name} ok\n"));
        } else {
            report.push_str(&format!("[-]{name} failed: reason withheld\n"));
            failed.push(*name);
        }
    }
    if !failed.is_empty() {
        tracing::warn!(checks = ?failed, "{endpoint} check failed");
        report.push_str(&format!("{endpoint} check failed\n"));
        return reply::text(StatusCode::INTERNAL_SERVER_ERROR, report);
    }
    if query.flag("verbose") {
        report.push_str(&format!("{endpoint} check passed\n"));
        return reply::text(StatusCode::OK, report);
    }
    reply::text(StatusCode::OK, "ok")
}
