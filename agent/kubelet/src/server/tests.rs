//! The server over real TLS: who may enter, and what it answers.

use super::*;
use crate::fake::{FakeApi, FakeRuntime, shared};
use crate::shared::PodView;
use serde_json::json;
use std::collections::BTreeMap;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[test]
fn queries_are_decoded() {
    let uri = "/exec/a/b/c?command=sh&command=-c&command=a%20b&tty=true&input=1";
    let request = Request::builder().uri(uri).body(Body::empty()).unwrap();
    let query = Query::of(&request);
    assert_eq!(query.all("command"), ["sh", "-c", "a b"]);
    assert!(query.flag(&["tty"]) && query.flag(&["input", "stdin"]) && !query.flag(&["output"]));
}

struct Ca {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    pem: String,
}

fn authority() -> Ca {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let pem = params.self_signed(&key).unwrap().pem();
    Ca { issuer: rcgen::Issuer::new(params, key), pem }
}

fn issue(ca: &Ca, name: &str, group: Option<&str>) -> (String, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    if let Some(group) = group {
        params.distinguished_name.push(rcgen::DnType::OrganizationName, group);
    }
    (params.signed_by(&key, &ca.issuer).unwrap().pem(), key.serialize_pem())
}

async fn get(addr: SocketAddr, ca: &Ca, client: Option<(String, String)>, path: &str) -> io::Result<String> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match client {
        None => config.with_no_client_auth(),
        Some((cert, key)) => {
            let cert = CertificateDer::from_pem_slice(cert.as_bytes()).unwrap();
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
            config.with_client_auth_cert(vec![cert], key).unwrap()
        }
    };
    let stream = TcpStream::connect(addr).await?;
    let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
    let mut stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    stream
        .write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes())
        .await?;
    let mut text = Vec::new();
    stream.read_to_end(&mut text).await?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

use std::io;

#[tokio::test]
async fn only_the_api_server_enters_and_logs_are_served() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = FakeRuntime::new(dir.path().to_owned());
    let shared = shared(dir.path(), runtime, &Arc::new(FakeApi::default()));
    let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n"},
        "spec": {"containers": [{"name": "a"}, {"name": "b"}]}}))
    .unwrap();
    // The runtime knows no such container any more: following ends at once.
    let containers = BTreeMap::from([("a".to_owned(), vec![(0, "a-0".to_owned()), (1, "a-1".to_owned())])]);
    shared.pods.write().insert(("n".into(), "p".into()), PodView { pod: Arc::new(pod), containers });
    for (id, text) in [("a-0", "old"), ("a-1", "new")] {
        let line = format!("2026-01-01T00:00:00Z stdout F {text}\n");
        std::fs::write(dir.path().join(format!("{id}.log")), line).unwrap();
    }
    let ca = authority();
    let (cert_pem, key_pem) = issue(&ca, "node", None);
    let mut config = shared.config.clone();
    config.tls = ServerTls { cert_pem, key_pem, client_ca_pem: ca.pem.clone() };
    config.listen = "127.0.0.1:0".parse().unwrap();
    let listener = Listener::bind(&config).await.unwrap();
    let addr = listener.addr();
    let stop = CancellationToken::new();
    tokio::spawn(run(listener, shared, stop.clone()));

    let api = || Some(issue(&ca, "kube-apiserver-kubelet-client", None));
    let answer = async |path: &str| get(addr, &ca, api(), path).await.unwrap();
    assert!(answer("/healthz").await.starts_with("HTTP/1.1 200"));
    assert!(answer("/containerLogs/n/p/a").await.ends_with("new\n\r\n0\r\n\r\n"));
    assert!(answer("/containerLogs/n/p/a?follow=true").await.contains("new\n"));
    assert!(answer("/containerLogs/n/p/a?previous=true").await.contains("old\n"));
    assert!(answer("/containerLogs/n/p/b").await.contains("is waiting to start: ContainerCreating"));
    assert!(answer("/containerLogs/n/p/none").await.starts_with("HTTP/1.1 404"));
    assert!(answer("/containerLogs/n/p/a?tailLines=x").await.starts_with("HTTP/1.1 400"));
    assert!(answer("/logs/../../etc/passwd").await.starts_with("HTTP/1.1 400"));
    assert!(answer("/logs/%2e%2e/passwd").await.starts_with("HTTP/1.1 400"));
    assert!(answer("/metrics").await.contains("kubelet_node_name{node=\"node\"} 1"));

    let admin = issue(&ca, "admin", Some("system:masters"));
    assert!(get(addr, &ca, Some(admin), "/healthz").await.unwrap().starts_with("HTTP/1.1 200"));
    let other = issue(&ca, "somebody", Some("system:nodes"));
    assert!(get(addr, &ca, Some(other), "/pods").await.unwrap().starts_with("HTTP/1.1 403"));
    let stranger = issue(&authority(), "kube-apiserver-kubelet-client", None);
    assert!(get(addr, &ca, Some(stranger), "/pods").await.is_err());
    assert!(get(addr, &ca, None, "/pods").await.is_err());
    stop.cancel();
}
