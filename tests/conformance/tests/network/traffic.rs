//! Pods reached directly: from pods and nodes, by ports of the host, through the API server.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use http::{Method, StatusCode};
use http_body_util::BodyExt as _;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use weft_tests_conformance::{Site, Way, address_of, server};

use crate::reach::{answered_by, client, from};

/// How long the API server may take over a request that it passes on.
const CALL_PATIENCE: Duration = Duration::from_secs(10);

/// One server on every node, and a client; in the network of its node if `host`.
async fn everywhere(site: &Site, host: bool) -> anyhow::Result<Vec<Pod>> {
    let mut pods = Vec::new();
    for (node, _) in site.nodes().await? {
        let mut pod = server(&format!("on-{node}"), "net", &["8080/tcp", "8081/udp"]);
        pod["spec"]["nodeName"] = json!(node);
        pods.push(pod);
    }
    let mut asking = client("client");
    asking["spec"]["hostNetwork"] = json!(host);
    let mut servers = site.pods(pods).await?;
    servers.sort_by_key(|pod| pod.metadata.name.clone());
    site.pod(asking).await?;
    Ok(servers)
}

async fn each_answers(site: Site, way: Way, port: u16, host: bool) -> anyhow::Result<()> {
    for pod in everywhere(&site, host).await? {
        let name = pod.metadata.name.clone().unwrap_or_default();
        let to: SocketAddr = (address_of(&pod)?, port).into();
        answered_by(&site, &from("client"), way, to, &[&name]).await?;
    }
    Ok(())
}

pub(crate) async fn pod_to_pod_http(site: Site) -> anyhow::Result<()> {
    each_answers(site, Way::Tcp, 8080, false).await
}

pub(crate) async fn pod_to_pod_udp(site: Site) -> anyhow::Result<()> {
    each_answers(site, Way::Udp, 8081, false).await
}

pub(crate) async fn node_to_pod_http(site: Site) -> anyhow::Result<()> {
    each_answers(site, Way::Tcp, 8080, true).await
}

pub(crate) async fn node_to_pod_udp(site: Site) -> anyhow::Result<()> {
    each_answers(site, Way::Udp, 8081, true).await
}

/// Three pods of one node share a port: another address or another protocol is another place.
pub(crate) async fn host_ports(site: Site) -> anyhow::Result<()> {
    const PORT: u16 = 54_323;
    let nodes = site.nodes().await?;
    let (node, address) = nodes.first().context("there is a node")?;
    let rows = [
        ("loopback", "127.0.0.1".to_owned(), "TCP"),
        ("tcp", address.to_string(), "TCP"),
        ("udp", address.to_string(), "UDP"),
    ];
    let mut pods = Vec::new();
    for (name, host, protocol) in &rows {
        let mut pod = server(name, name, &["8080/tcp", "8080/udp"]);
        pod["spec"]["nodeSelector"] = json!({"kubernetes.io/hostname": node});
        pod["spec"]["containers"][0]["ports"] =
            json!([{"containerPort": 8080, "hostPort": PORT, "protocol": protocol, "hostIP": host}]);
        pods.push(pod);
    }
    let mut asking = client("client");
    asking["spec"]["nodeName"] = json!(node);
    asking["spec"]["hostNetwork"] = json!(true);
    pods.push(asking);
    site.pods(pods).await?;
    for ((name, host, _), way) in rows.iter().zip([Way::Tcp, Way::Tcp, Way::Udp]) {
        answered_by(&site, &from("client"), way, (host.parse::<std::net::IpAddr>()?, PORT).into(), &[name])
            .await?;
    }
    Ok(())
}

/// A server with a Service of two ports before it.
async fn proxied(site: &Site) -> anyhow::Result<()> {
    let mut pod = server("web", "web", &["80/tcp", "1080/tcp=second"]);
    pod["spec"]["containers"][0]["ports"] =
        json!([{"name": "first", "containerPort": 80}, {"name": "second", "containerPort": 1080}]);
    site.pod(pod).await?;
    let ports: Value = json!([
        {"name": "one", "port": 81, "targetPort": "first"},
        {"name": "two", "port": 82, "targetPort": 1080},
    ]);
    site.service("web", json!({"selector": {"app": "web"}, "ports": ports})).await?;
    Ok(())
}

/// Status and body of a request to the API server.
async fn call(site: &Site, method: &Method, path: &str) -> anyhow::Result<(StatusCode, String)> {
    let base = format!("/api/v1/namespaces/{}", site.namespace);
    let request = http::Request::builder().method(method).uri(format!("{base}/{path}"));
    let request = request.body(kube::client::Body::from(Vec::new()))?;
    let exchange = async {
        let (head, body) = site.client.send(request).await?.into_parts();
        let bytes = body.collect().await?.to_bytes();
        Ok((head.status, String::from_utf8_lossy(&bytes).into_owned()))
    };
    tokio::time::timeout(CALL_PATIENCE, exchange).await.with_context(|| format!("{method} {path}"))?
}

pub(crate) async fn proxy_ports(site: Site) -> anyhow::Result<()> {
    proxied(&site).await?;
    let rows = [
        ("services/web:one", "web"),
        ("services/http:web:one", "web"),
        ("services/web:two", "second"),
        ("services/http:web:two", "second"),
        ("services/web:81", "web"),
        ("services/web:82", "second"),
        ("pods/web", "web"),
        ("pods/web:80", "web"),
        ("pods/web:1080", "second"),
        ("pods/http:web:80", "web"),
        ("pods/http:web:1080", "second"),
    ];
    for (object, by) in rows {
        site.until(&format!("{object} is answered by {by}"), async || {
            let (status, body) = call(&site, &Method::GET, &format!("{object}/proxy/hostname")).await?;
            ensure!(status == StatusCode::OK && body.trim() == by, "{status}: {body}");
            Ok(Some(()))
        })
        .await?;
    }
    let (status, _) = call(&site, &Method::GET, "services/web:three/proxy/").await?;
    ensure!(status == StatusCode::SERVICE_UNAVAILABLE, "an unknown port is answered with {status}");
    let (status, _) = call(&site, &Method::GET, "pods/nobody/proxy/").await?;
    ensure!(status == StatusCode::NOT_FOUND, "an unknown pod is answered with {status}");
    Ok(())
}

const METHODS: [Method; 6] =
    [Method::DELETE, Method::OPTIONS, Method::PATCH, Method::POST, Method::PUT, Method::GET];

/// Each method comes through to `path`, and the answer back.
async fn methods(site: &Site, path: &str, arrives_as: &str) -> anyhow::Result<()> {
    for object in ["pods/web", "services/web:one"] {
        for method in METHODS {
            let ask = format!("{object}/proxy{path}?method={method}");
            let wanted = format!("{method} {arrives_as}?method={method}");
            site.until(&format!("{method} {ask} arrives as {wanted}"), async || {
                let (status, body) = call(site, &method, &ask).await?;
                ensure!(status == StatusCode::OK && body.trim().ends_with(&wanted), "{status}: {body}");
                Ok(Some(()))
            })
            .await?;
        }
        let (status, body) = call(site, &Method::HEAD, &format!("{object}/proxy/some")).await?;
        ensure!(status == StatusCode::OK && body.is_empty(), "HEAD: {status}: {body:?}");
    }
    Ok(())
}

/// Without a path, a GET is sent to the path `/` first; other methods go there at once.
pub(crate) async fn proxy(site: Site) -> anyhow::Result<()> {
    proxied(&site).await?;
    methods(&site, "/", "/").await?;
    for object in ["pods/web", "services/web:one"] {
        for method in [Method::GET, Method::HEAD] {
            let (status, _) = call(&site, &method, &format!("{object}/proxy")).await?;
            ensure!(
                status == StatusCode::MOVED_PERMANENTLY,
                "{method} of {object} without a path is {status}"
            );
        }
        let (status, body) = call(&site, &Method::POST, &format!("{object}/proxy")).await?;
        ensure!(status == StatusCode::OK && body.trim().ends_with(" POST /"), "{status}: {body}");
    }
    Ok(())
}

pub(crate) async fn proxy_with_path(site: Site) -> anyhow::Result<()> {
    proxied(&site).await?;
    methods(&site, "/some/path/with%20blank", "/some/path/with%20blank").await?;
    let (status, _) = call(&site, &Method::GET, "pods/web/proxy/code/404").await?;
    ensure!(status == StatusCode::NOT_FOUND, "the server's own status comes back, not {status}");
    Ok(())
}
