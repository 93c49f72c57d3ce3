//! Owns `proxy`: a request passed on to a pod, to an endpoint of a Service, or to a node.

mod links;
mod page;

use self::links::Way;
use super::super::Call;
use super::kubelet;
use crate::backend::Backend;
use crate::body::{Body, BoxError, Request, Response};
use crate::kubelet::ProxyError;
use crate::transport::StillReading;
use http::header::{AUTHORIZATION, CONNECTION, HOST, HeaderName, LOCATION, UPGRADE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use http_body_util::BodyExt;
use rand::RngExt as _;
use serde_json::Value;
use std::net::{IpAddr, SocketAddr};
use weft_control_api::status::Status;

/// Headers that are a connection's own (RFC 9110 §7.6.1).
const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "proxy-connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];
/// What says who the client is to this server, and is no business of a backend.
const IMPERSONATION: &str = "impersonate-";
/// Port of a backend that doesn't say.
const HTTP_PORT: u16 = 80;

/// A name as `proxy` takes it: `name`, `name:port` or `scheme:name:port`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Target<'a> {
    is_tls: bool,
    name: &'a str,
    port: &'a str,
}

impl<'a> Target<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let parts: Vec<&str> = text.split(':').collect();
        let (scheme, name, port) = match parts.as_slice() {
            [name] => ("", *name, ""),
            [name, port] => ("", *name, *port),
            [scheme, name, port] => (*scheme, *name, *port),
            _ => return None,
        };
        let is_tls = match scheme {
            "" | "http" => false,
            "https" => true,
            _ => return None,
        };
        (!name.is_empty()).then_some(Self { is_tls, name, port })
    }
}

/// Passes a request on.
pub(super) async fn answer(call: &Call, body: Body) -> Result<Response, Status> {
    let path = tail(call);
    let is_upgrade = call.head.headers.contains_key(UPGRADE);
    if path.is_empty() && !is_upgrade && matches!(call.head.method, Method::GET | Method::HEAD) {
        return redirect(call);
    }
    let resource = call.kind.plural;
    let invalid = || {
        let singular = resource.trim_end_matches('s');
        Status::bad_request(format!("invalid {singular} request {:?}", call.info.name))
    };
    let target = Target::parse(&call.info.name).ok_or_else(invalid)?;
    let request = request(call, path, body)?;
    let mut way = Way {
        prefix: call.head.uri.path().strip_suffix(path).unwrap_or_default().to_owned(),
        asked: request.headers().get(HOST).and_then(|host| host.to_str().ok()).map(str::to_owned),
        backend: None,
    };
    let response = match resource {
        "pods" | "services" => {
            let backend =
                if resource == "pods" { pod(call, &target).await? } else { service(call, &target).await? };
            way.backend = Some(backend.address.to_string());
            call.api.backends.send(backend, request).await
        }
        _ => node(call, &target, request).await?,
    };
    let response = response.map_err(|error| unreachable(&error))?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let mut client = http::Request::new(());
        client.extensions_mut().clone_from(&call.head.extensions);
        return Ok(call.api.backends.join(hyper::upgrade::on(client), response));
    }
    Ok(pass_back(&call.head.method, way, response))
}

/// The path behind `proxy`, as the client wrote it.
fn tail(call: &Call) -> &str {
    let path = call.head.uri.path();
    // /api/v1/namespaces/<namespace>/<resource>/<name>/proxy, without the namespace for nodes.
    let segments = if call.kind.namespaced { 7 } else { 5 };
    let end = path.match_indices('/').nth(segments).map(|(at, _)| at);
    end.and_then(|at| path.get(at..)).unwrap_or_default()
}

/// A page's relative links need a path that ends with a slash.
fn redirect(call: &Call) -> Result<Response, Status> {
    let uri = &call.head.uri;
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    let location = HeaderValue::try_from(format!("{}/{query}", uri.path())).map_err(Status::internal)?;
    let mut response = Response::new(crate::body::empty());
    *response.status_mut() = StatusCode::MOVED_PERMANENTLY;
    response.headers_mut().insert(LOCATION, location);
    Ok(response)
}

/// The request as the backend gets it.
fn request(call: &Call, path: &str, body: Body) -> Result<Request, Status> {
    let path = if path.is_empty() { "/" } else { path };
    let query = call.head.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    let mut request = http::Request::new(body);
    *request.method_mut() = call.head.method.clone();
    *request.uri_mut() = format!("{path}{query}")
        .parse()
        .map_err(|error: http::uri::InvalidUri| Status::bad_request(error.to_string()))?;
    let from = &call.head.headers;
    let headers = request.headers_mut();
    headers.clone_from(from);
    strip(headers);
    headers.remove(AUTHORIZATION);
    let impersonating: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with(IMPERSONATION)).cloned().collect();
    for name in impersonating {
        headers.remove(name);
    }
    if let Some(protocol) = from.get(UPGRADE) {
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, protocol.clone());
    }
    // HTTP/2 has the host in its path.
    let host = from.get(HOST).cloned();
    let authority = call.head.uri.authority().and_then(|a| HeaderValue::try_from(a.as_str()).ok());
    if let Some(host) = host.or(authority) {
        headers.insert(HOST, host.clone());
        headers.insert("x-forwarded-host", host);
    }
    headers.insert("x-forwarded-proto", HeaderValue::from_static("https"));
    if let Ok(uri) = HeaderValue::try_from(call.head.uri.path()) {
        headers.insert("x-forwarded-uri", uri);
    }
    Ok(request)
}

/// Removes what belongs to one connection only, and what `Connection` names besides.
fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
}

/// The response as the client gets it. Redirections and links within the backend stay behind the proxy.
fn pass_back(method: &Method, way: Way, response: http::Response<hyper::body::Incoming>) -> Response {
    let mut response = response.map(|body| body.map_err(BoxError::from).boxed_unsync());
    strip(response.headers_mut());
    if let Some(location) = response.headers().get(LOCATION).map(HeaderValue::as_bytes) {
        let led = way.lead(location).map(|(cut, prefix)| {
            HeaderValue::from_bytes(
                &[&location[..cut.start], prefix.as_bytes(), &location[cut.end..]].concat(),
            )
        });
        if let Some(Ok(location)) = led {
            response.headers_mut().insert(LOCATION, location);
        }
    } else if method != Method::HEAD {
        response = page::lead(response, way);
    }
    response.extensions_mut().insert(StillReading);
    response
}

fn unreachable(error: &ProxyError) -> Status {
    Status::service_unavailable(format!("error trying to reach service: {}", crate::cache::Chain(error)))
}

/// An address that a client may be led to: not this machine's own, nor one that means another on each link.
fn proxyable(text: &str) -> Result<IpAddr, Status> {
    let address: IpAddr = text.parse().map_err(|_invalid| Status::bad_request("address not allowed"))?;
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if address.is_loopback() || address.is_unspecified() || address.is_multicast() || link_local {
        return Err(Status::bad_request("address not allowed"));
    }
    Ok(address)
}

fn number(port: &str) -> Result<u16, Status> {
    port.parse().map_err(|_invalid| Status::bad_request(format!("invalid port {port:?}")))
}

/// A pod's own address; its first declared port unless the name has one.
async fn pod(call: &Call, target: &Target<'_>) -> Result<Backend, Status> {
    let key = crate::api::object_key(&call.info.namespace, target.name);
    let not_found = || Status::not_found(call.kind.group_resource(), target.name);
    let pod = call.api.fresh(call.stored(), &key).await?.ok_or_else(not_found)?.parse();
    let port = if target.port.is_empty() {
        let containers = pod["spec"]["containers"].as_array().into_iter().flatten();
        let mut declared = containers.filter_map(|container| container["ports"][0]["containerPort"].as_u64());
        declared.next().and_then(|port| u16::try_from(port).ok()).unwrap_or(HTTP_PORT)
    } else {
        number(target.port)?
    };
    let address = proxyable(pod["status"]["podIP"].as_str().unwrap_or_default())?;
    Ok(Backend { address: SocketAddr::new(address, port), is_tls: target.is_tls })
}

/// Any ready endpoint of a Service.
async fn service(call: &Call, target: &Target<'_>) -> Result<Backend, Status> {
    let namespace = &call.info.namespace;
    let key = crate::api::object_key(namespace, target.name);
    let not_found = || Status::not_found(call.kind.group_resource(), target.name);
    let service = call.api.fresh(call.stored(), &key).await?.ok_or_else(not_found)?.parse();
    let port = port_name(&service, target)?;
    let endpoints = call.api.cached("", "endpoints", namespace, target.name).map(|item| item.parse());
    let found = candidates(endpoints.as_ref().unwrap_or(&Value::Null), port);
    if found.is_empty() {
        let text = format!("no endpoints available for service {:?}", target.name);
        return Err(Status::service_unavailable(text));
    }
    let (address, port) = found[rand::rng().random_range(0..found.len())];
    Ok(Backend { address: SocketAddr::new(proxyable(address)?, port), is_tls: target.is_tls })
}

/// The name of the Service's port that is meant: by name, or by number.
fn port_name<'a>(service: &'a Value, target: &Target<'a>) -> Result<&'a str, Status> {
    let Ok(number) = target.port.parse::<u64>() else { return Ok(target.port) };
    let mut ports = service["spec"]["ports"].as_array().into_iter().flatten();
    let port = ports.find(|port| port["port"].as_u64() == Some(number)).ok_or_else(|| {
        let text = format!("no service port {number} found for service {:?}", target.name);
        Status::service_unavailable(text)
    })?;
    Ok(port["name"].as_str().unwrap_or_default())
}

/// Ready addresses with the port of that name.
fn candidates<'a>(endpoints: &'a Value, port: &str) -> Vec<(&'a str, u16)> {
    let mut found = Vec::new();
    for subset in endpoints["subsets"].as_array().into_iter().flatten() {
        let mut ports = subset["ports"].as_array().into_iter().flatten();
        let named = ports.find(|candidate| candidate["name"].as_str().unwrap_or_default() == port);
        let number = named.and_then(|named| u16::try_from(named["port"].as_u64()?).ok());
        let addresses = subset["addresses"].as_array().into_iter().flatten();
        let addresses = addresses.filter_map(|address| address["ip"].as_str());
        found.extend(addresses.filter_map(|address| Some((address, number?))));
    }
    found
}

/// A node's kubelet with this server's own identity, or any other port of the node.
async fn node(
    call: &Call,
    target: &Target<'_>,
    request: Request,
) -> Result<Result<http::Response<hyper::body::Incoming>, ProxyError>, Status> {
    let not_found = || Status::not_found(call.kind.group_resource(), target.name);
    call.api.fresh(call.stored(), target.name).await?.ok_or_else(not_found)?;
    let kubelet = kubelet::node_endpoint(call, target.name)?;
    let port = if target.port.is_empty() { kubelet.port } else { number(target.port)? };
    if port == kubelet.port {
        return Ok(kubelet::proxy(call)?.send(&kubelet, request).await);
    }
    let address = SocketAddr::new(proxyable(&kubelet.host)?, port);
    Ok(call.api.backends.send(Backend { address, is_tls: target.is_tls }, request).await)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn names_with_scheme_and_port() {
        let target = |text| Target::parse(text).map(|t| (t.is_tls, t.name, t.port));
        assert_eq!(target("web"), Some((false, "web", "")));
        assert_eq!(target("web:80"), Some((false, "web", "80")));
        assert_eq!(target("https:web:admin"), Some((true, "web", "admin")));
        assert_eq!(target("http:web:"), Some((false, "web", "")));
        assert_eq!(target(":80"), None);
        assert_eq!(target("ftp:web:21"), None);
        assert_eq!(target("a:b:c:d"), None);
    }

    #[test]
    fn only_addresses_of_others() {
        for text in ["127.0.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "::1", "fe80::1", "web", ""] {
            assert!(proxyable(text).is_err(), "{text}");
        }
        assert!(proxyable("10.42.0.7").is_ok() && proxyable("fd00:10:42::7").is_ok());
    }

    #[test]
    fn ready_addresses_of_the_port() {
        let endpoints = json!({"subsets": [
            {"addresses": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.2"}], "notReadyAddresses": [{"ip": "10.0.0.9"}],
             "ports": [{"name": "a", "port": 1}, {"name": "b", "port": 2}]},
            {"addresses": [{"ip": "10.0.0.3"}], "ports": [{"name": "b", "port": 3}]},
        ]});
        assert_eq!(candidates(&endpoints, "b"), [("10.0.0.1", 2), ("10.0.0.2", 2), ("10.0.0.3", 3)]);
        assert_eq!(candidates(&endpoints, "a"), [("10.0.0.1", 1), ("10.0.0.2", 1)]);
        assert!(candidates(&endpoints, "c").is_empty() && candidates(&Value::Null, "a").is_empty());
    }

    #[test]
    fn what_is_a_connections_own_goes_no_further() {
        let mut headers = HeaderMap::new();
        for (name, value) in
            [("connection", "x-mine, close"), ("x-mine", "1"), ("te", "trailers"), ("accept", "*/*")]
        {
            headers.insert(name, HeaderValue::from_static(value));
        }
        strip(&mut headers);
        assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["accept"]);
    }
}
