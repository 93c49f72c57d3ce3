//! Owns logs and upgrades through the server, against a kubelet that answers a line and echoes bytes.

use crate::support::Cluster;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::json;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(cluster: &Cluster) -> Arc<rustls::RootCertStore> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(cluster.authority.pem.as_bytes()).unwrap()).unwrap();
    Arc::new(roots)
}

/// The head of a message.
async fn head(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

/// Serves every connection; the port.
async fn kubelet(cluster: &Cluster) -> u16 {
    let pem = cluster.authority.sign("system:node:n1", &["system:nodes"], true);
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(roots(cluster), provider())
        .build()
        .unwrap();
    let config = rustls::ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            vec![CertificateDer::from_pem_slice(pem.certificates.as_bytes()).unwrap()],
            PrivateKeyDer::from_pem_slice(pem.key.as_bytes()).unwrap(),
        )
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let mut stream = acceptor.accept(stream).await.unwrap();
                let request = head(&mut stream).await;
                if request.starts_with("GET /containerLogs/default/p/a?") {
                    let body = format!("{}\n", request.lines().next().unwrap());
                    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                    stream.write_all(answer.as_bytes()).await.unwrap();
                } else if request.starts_with("POST /head?") {
                    let answer = format!(
                        "HTTP/1.1 201 Created\r\nLocation: /made/1\r\nKeep-Alive: timeout=5\r\nContent-Length: {}\r\n\r\n{request}",
                        request.len()
                    );
                    stream.write_all(answer.as_bytes()).await.unwrap();
                } else if request.starts_with("GET /containerLogs/") {
                    let body = "container \"b\" in pod \"p\" is waiting to start: ContainerCreating\n";
                    let answer =
                        format!("HTTP/1.1 400 Bad Request\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                    stream.write_all(answer.as_bytes()).await.unwrap();
                } else {
                    let path = request.split(' ').nth(1).unwrap();
                    let answer = format!(
                        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX-Path: {path}\r\n\r\n"
                    );
                    stream.write_all(answer.as_bytes()).await.unwrap();
                    let (mut read, mut write) = tokio::io::split(stream);
                    tokio::io::copy(&mut read, &mut write).await.unwrap();
                }
            });
        }
    });
    port
}

pub(crate) async fn set_up(cluster: &Cluster) {
    let http = cluster.admin();
    let port = kubelet(cluster).await;
    http.create("/api/v1/nodes", &json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}}))
        .await;
    let status = json!({"status": {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": port}}}});
    assert_eq!(http.merge("/api/v1/nodes/n1/status", &status).await.code, 200);
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
    http.create("/api/v1/namespaces/default/serviceaccounts", &account).await;
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"nodeName": "n1",
        "containers": [{"name": "a", "image": "i"}, {"name": "b", "image": "i"}]}});
    http.create("/api/v1/namespaces/default/pods", &pod).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_come_from_the_kubelet() {
    let cluster = Cluster::start().await;
    set_up(&cluster).await;
    let http = cluster.admin();
    let log = "/api/v1/namespaces/default/pods/p/log";
    assert_eq!(
        http.get(log).await.failure(),
        (
            400,
            "BadRequest".into(),
            "a container name must be specified for pod p, choose one of: [a b]".into()
        )
    );
    let answer = http.get(&format!("{log}?container=a&tailLines=5&follow=true")).await;
    assert_eq!(answer.text, "GET /containerLogs/default/p/a?follow=true&tailLines=5 HTTP/1.1\n");
    assert_eq!(
        http.get(&format!("{log}?container=b")).await.failure(),
        (
            400,
            "BadRequest".into(),
            "container \"b\" in pod \"p\" is waiting to start: ContainerCreating".into()
        )
    );
    for climb in ["../../../etc/passwd", "..%2F..%2Fetc", "a/../b"] {
        let answer = http.get(&format!("{log}?container={climb}")).await;
        assert_eq!(answer.code, 400, "{climb}: {}", answer.text);
    }
    assert_eq!(http.get("/api/v1/namespaces/default/pods/..%2Fp/log?container=a").await.code, 404);
    assert_eq!(http.get(&format!("{log}?container=a&tailLines=-1")).await.code, 422);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn upgrades_are_passed_through() {
    let cluster = Cluster::start().await;
    set_up(&cluster).await;
    let mut stream = connect(&cluster).await;
    let request = "GET /api/v1/namespaces/default/pods/p/exec?container=a&command=ls&command=-l&stdout=true HTTP/1.1\r\n\
        Host: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n";
    let answer = upgrade(&mut stream, request).await;
    assert!(answer.contains("/exec/default/p/a?output=1&command=ls&command=-l"), "{answer}");
    drop(stream);
    cluster.stop().await;
}

pub(crate) type Connection = tokio_rustls::client::TlsStream<TcpStream>;

/// A connection of the administrator's.
pub(crate) async fn connect(cluster: &Cluster) -> Connection {
    let admin = cluster.authority.sign("admin", &["system:masters"], false);
    let config = rustls::ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots(cluster))
        .with_client_auth_cert(
            vec![CertificateDer::from_pem_slice(admin.certificates.as_bytes()).unwrap()],
            PrivateKeyDer::from_pem_slice(admin.key.as_bytes()).unwrap(),
        )
        .unwrap();
    let tcp = TcpStream::connect(cluster.url.strip_prefix("https://").unwrap()).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let name = ServerName::try_from("127.0.0.1").unwrap();
    connector.connect(name, tcp).await.unwrap()
}

/// Switches protocols and sees its bytes come back; the answer's head.
pub(crate) async fn upgrade(stream: &mut Connection, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    let answer = head(stream).await;
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    stream.write_all(b"hello").await.unwrap();
    let mut echo = [0; 5];
    stream.read_exact(&mut echo).await.unwrap();
    assert_eq!(&echo, b"hello");
    answer
}
