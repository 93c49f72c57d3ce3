//! Owns logs, exec, attach and port forwarding: which container of which kubelet is asked, and how.

use super::super::Call;
use crate::body::{self, Request, Response};
use crate::kubelet::{Endpoint, KubeletProxy};
use http::header::{CONNECTION, HOST, UPGRADE};
use http::{HeaderValue, Method};
use serde_json::Value;
use weft_control_api::status::Status;

/// The port of a kubelet that doesn't say.
const KUBELET_PORT: u16 = 10250;
/// Options of a log that are passed on.
const LOG_OPTIONS: [&str; 9] = [
    "follow",
    "previous",
    "sinceSeconds",
    "sinceTime",
    "timestamps",
    "tailLines",
    "limitBytes",
    "stream",
    "insecureSkipTLSVerifyBackend",
];
/// Headers of an upgrade that are passed on.
const UPGRADE_HEADERS: [&str; 6] = [
    "sec-websocket-key",
    "sec-websocket-version",
    "sec-websocket-protocol",
    "sec-websocket-extensions",
    "x-stream-protocol-version",
    "origin",
];

pub(super) fn proxy(call: &Call) -> Result<&KubeletProxy, Status> {
    call.api
        .kubelet
        .as_ref()
        .ok_or_else(|| Status::service_unavailable("this server has no client certificate for kubelets"))
}

async fn pod(call: &Call) -> Result<Value, Status> {
    let item = call.api.fresh(call.stored(), &call.key()).await?.ok_or_else(|| call.not_found())?;
    Ok(item.parse())
}

/// Passes a container's log on.
pub(super) async fn log(call: &Call) -> Result<Response, Status> {
    check_log_options(call)?;
    let pod = pod(call).await?;
    let container = container(call, &pod)?;
    let Some(endpoint) = endpoint(call, &pod)? else {
        // Nothing has run, so nothing was logged.
        return Ok(crate::reply::text(http::StatusCode::OK, ""));
    };
    let options = LOG_OPTIONS.iter().filter_map(|key| Some((*key, call.query.get(key)?)));
    let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(options).finish();
    let path = format!("/containerLogs/{}/{}/{container}", call.info.namespace, call.info.name);
    let request = request(&Method::GET, &endpoint, &path, &query)?;
    let mut response = proxy(call)?.fetch(&endpoint, request).await?;
    for name in [CONNECTION.as_str(), "transfer-encoding", "date", "content-length"] {
        response.headers_mut().remove(name);
    }
    response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    Ok(response)
}

fn check_log_options(call: &Call) -> Result<(), Status> {
    use weft_control_api::field::{FieldError, FieldPath};
    let mut errors = Vec::new();
    for (key, least, text) in [
        ("tailLines", 0, "must be greater than or equal to 0"),
        ("limitBytes", 1, "must be greater than 0"),
        ("sinceSeconds", 1, "must be greater than 0"),
    ] {
        let Some(value) = call.query.get(key) else { continue };
        let number: i64 = value.parse().map_err(|_ignored| {
            Status::bad_request(format!(
                "unable to decode query: {key}: strconv.ParseInt: parsing {value:?}: invalid syntax"
            ))
        })?;
        if number < least {
            errors.push(FieldError::invalid(&FieldPath::new(key), number, text));
        }
    }
    if call.query.get("sinceSeconds").is_some() && call.query.get("sinceTime").is_some() {
        let detail = "at most one of `sinceTime` or `sinceSeconds` may be specified";
        errors.push(FieldError::forbidden(&FieldPath::default(), detail));
    }
    if errors.is_empty() {
        return Ok(());
    }
    let kind = weft_control_api::status::GroupKind { group: "", kind: "PodLogOptions" };
    Err(Status::invalid(kind, &call.info.name, errors))
}

/// Joins a client with a container: exec, attach, port forwarding.
pub(super) async fn stream(call: &Call) -> Result<Response, Status> {
    let pod = pod(call).await?;
    let what = call.info.subresource.as_str();
    let (namespace, name) = (&call.info.namespace, &call.info.name);
    let no_host = || Status::bad_request(format!("pod {name} does not have a host assigned"));
    let (path, query) = if what == "portforward" {
        let ports = call.query.all("ports").iter().map(|port| ("port", port.as_str()));
        let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(ports).finish();
        (format!("/portForward/{namespace}/{name}"), query)
    } else {
        if what == "exec" && call.query.all("command").is_empty() {
            return Err(Status::bad_request("you must specify at least one command for the container"));
        }
        let container = container(call, &pod)?;
        (format!("/{what}/{namespace}/{name}/{container}"), stream_options(call))
    };
    let endpoint = endpoint(call, &pod)?.ok_or_else(no_host)?;
    let headers = &call.head.headers;
    let Some(protocol) = headers.get(UPGRADE).cloned() else {
        return Err(Status::bad_request("Upgrade request required"));
    };
    let mut request = request(&call.head.method, &endpoint, &path, &query)?;
    request.headers_mut().insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    request.headers_mut().insert(UPGRADE, protocol);
    for key in UPGRADE_HEADERS {
        for value in headers.get_all(key) {
            if let Ok(key) = http::HeaderName::from_bytes(key.as_bytes()) {
                request.headers_mut().append(key, value.clone());
            }
        }
    }
    let mut client = http::Request::new(());
    client.extensions_mut().clone_from(&call.head.extensions);
    proxy(call)?.upgrade(&endpoint, request, hyper::upgrade::on(client)).await
}

fn stream_options(call: &Call) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    for (from, to) in [("stdin", "input"), ("stdout", "output"), ("stderr", "error"), ("tty", "tty")] {
        if call.query.flag(from) {
            query.append_pair(to, "1");
        }
    }
    query.extend_pairs(call.query.all("command").iter().map(|word| ("command", word)));
    query.finish()
}

fn request(method: &Method, to: &Endpoint, path: &str, query: &str) -> Result<Request, Status> {
    let target = if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") };
    let host = if to.host.contains(':') { format!("[{}]", to.host) } else { to.host.clone() };
    http::Request::builder()
        .method(method)
        .uri(target)
        .header(HOST, format!("{host}:{}", to.port))
        .body(body::empty())
        .map_err(Status::internal)
}

/// The container that a request means.
fn container(call: &Call, pod: &Value) -> Result<String, Status> {
    let names = |key: &str| -> Vec<String> {
        let list = pod["spec"][key].as_array().into_iter().flatten();
        list.filter_map(|c| c["name"].as_str().map(str::to_owned)).collect()
    };
    let (containers, init) = (names("containers"), names("initContainers"));
    let pod = &call.info.name;
    if let Some(wanted) = call.query.get("container") {
        let known =
            containers.iter().chain(&init).chain(&names("ephemeralContainers")).any(|name| name == wanted);
        return if known {
            Ok(wanted.to_owned())
        } else {
            Err(Status::bad_request(format!("container {wanted} is not valid for pod {pod}")))
        };
    }
    match containers.as_slice() {
        [one] => Ok(one.clone()),
        [] => Err(Status::bad_request(format!("a container name must be specified for pod {pod}"))),
        several => {
            let mut text = format!(
                "a container name must be specified for pod {pod}, choose one of: [{}]",
                several.join(" ")
            );
            if !init.is_empty() {
                text.push_str(&format!(" or one of the init containers: [{}]", init.join(" ")));
            }
            Err(Status::bad_request(text))
        }
    }
}

/// Where the kubelet of the pod's node listens; none if the pod has no node.
fn endpoint(call: &Call, pod: &Value) -> Result<Option<Endpoint>, Status> {
    let Some(node) = pod["spec"]["nodeName"].as_str().filter(|node| !node.is_empty()) else {
        return Ok(None);
    };
    node_endpoint(call, node).map(Some)
}

/// Where the kubelet of a node listens.
pub(super) fn node_endpoint(call: &Call, node: &str) -> Result<Endpoint, Status> {
    let nodes = weft_control_api::status::GroupResource { group: "", resource: "nodes" };
    let object =
        call.api.cached("", "nodes", "", node).ok_or_else(|| Status::not_found(nodes, node))?.parse();
    let addresses = object["status"]["addresses"].as_array();
    let of_type = |wanted: &str| {
        addresses.into_iter().flatten().find(|a| a["type"] == wanted).and_then(|a| a["address"].as_str())
    };
    let host = ["InternalIP", "ExternalIP", "Hostname"].into_iter().find_map(of_type);
    let host = host.ok_or_else(|| Status::internal(format!("node {node} has no address")))?.to_owned();
    let port = object["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"].as_u64();
    let port =
        port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0).unwrap_or(KUBELET_PORT);
    Ok(Endpoint { host, port })
}
