//! The answers, asked for over real connections.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::desired::Health;
use crate::tables::ServiceName;

/// A port that is free, as far as one can know.
fn free_port() -> u16 {
    std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

async fn ask(port: u16, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    stream
        .write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes())
        .await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}

/// Asks until the answer is as wanted.
async fn until(port: u16, path: &str, wanted: impl Fn(&io::Result<String>) -> bool) -> io::Result<String> {
    for _ in 0..500 {
        let answer = ask(port, path).await;
        if wanted(&answer) {
            return answer;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("port {port} never answers {path} as wanted: {:?}", ask(port, path).await);
}

fn has<'a>(part: &'a str) -> impl Fn(&io::Result<String>) -> bool + 'a {
    move |answer| answer.as_ref().is_ok_and(|text| text.contains(part))
}

#[tokio::test]
async fn health_and_metrics_are_served() {
    let at = || SocketAddr::new(Ipv4Addr::LOCALHOST.into(), free_port());
    let (health, metrics) = (at(), at());
    let config = ProxyConfig { health: Some(health), metrics: Some(metrics), ..ProxyConfig::default() };
    let shared = Arc::new(Shared::default());
    let serving = Arc::clone(&shared);
    // The port is taken at first.
    let squatter = std::net::TcpListener::bind(health).unwrap();
    let server = tokio::spawn(async move { serve(&config, serving, None).await });
    until(metrics.port(), "/proxyMode", has("ebpf")).await.unwrap();
    drop(squatter);
    let good = until(health.port(), "/healthz", has("200 OK")).await.unwrap();
    assert!(
        good.contains("\"nodeEligible\":true") && good.contains("x-content-type-options: nosniff"),
        "{good}"
    );
    let long_ago = Instant::now().checked_sub(Duration::from_secs(3_600)).unwrap();
    shared.health.lock().queued(long_ago);
    for path in ["/healthz", "/livez"] {
        assert!(has("503 Service Unavailable")(&ask(health.port(), path).await), "{path}");
    }
    shared.health.lock().updated();
    assert!(has("200 OK")(&ask(health.port(), "/livez").await));
    let text = ask(metrics.port(), "/metrics").await.unwrap();
    for line in [
        "kubeproxy_proxy_healthz_total{code=\"503\"} 1",
        "kubeproxy_proxy_livez_total{code=\"200\"} 1",
        "kubeproxy_sync_proxy_rules_duration_seconds_count 0",
        "kubeproxy_sync_proxy_rules_endpoint_changes_total 0",
        "kubeproxy_network_programming_duration_seconds_bucket{le=\"300.0\"} 0",
        "weft_map_capacity{map=\"slots\"} 524288",
    ] {
        assert!(text.contains(line), "{line} is missing in\n{text}");
    }
    server.abort();
}

fn change(name: &str, port: u16, local_endpoints: usize) -> (ServiceName, Option<Health>) {
    let name = ServiceName::new("shop", name);
    (name, Some(Health { port, local_endpoints }))
}

#[tokio::test]
async fn a_load_balancer_learns_of_local_endpoints() {
    let shared = Arc::new(Shared::default());
    let mut checks = Checks::new(Arc::new(ProxyConfig::default()), Arc::clone(&shared));
    let (port, other) = (free_port(), free_port());
    checks.apply(vec![change("front", port, 2)]);
    let answer = until(port, "/", has("200 OK")).await.unwrap();
    for part in [
        "x-load-balancing-endpoint-weight: 2",
        "content-type: application/json",
        "\"localEndpoints\":2",
        "\"serviceProxyHealthy\":true",
        "\"name\":\"front\"",
        "\"namespace\":\"shop\"",
    ] {
        assert!(answer.contains(part), "{part} is missing in\n{answer}");
    }
    checks.apply(vec![change("front", port, 0)]);
    assert!(has("503 Service Unavailable")(&ask(port, "/healthz").await));
    checks.apply(vec![change("front", port, 1)]);
    shared.health.lock().queued(Instant::now().checked_sub(Duration::from_secs(3_600)).unwrap());
    let late = ask(port, "/").await.unwrap();
    assert!(late.contains("503") && late.contains("\"serviceProxyHealthy\":false"), "{late}");
    // Another Service gets the port at the moment when the first moves.
    checks.apply(vec![change("front", other, 1), change("back", port, 1)]);
    until(port, "/", has("\"name\":\"back\"")).await.unwrap();
    until(other, "/", has("\"name\":\"front\"")).await.unwrap();
    let gone = ServiceName::new("shop", "back");
    checks.apply(vec![(gone, None)]);
    until(port, "/", |answer| answer.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused))
        .await
        .unwrap_err();
}

#[tokio::test]
async fn only_chosen_addresses_answer() {
    let ranges = vec!["192.0.2.0/24".parse().unwrap()];
    let config = ProxyConfig { node_port_addresses: ranges, ..ProxyConfig::default() };
    assert!(config.answers("192.0.2.7".parse().unwrap()) && !config.answers("127.0.0.1".parse().unwrap()));
    assert!(ProxyConfig::default().answers("127.0.0.1".parse().unwrap()));
    let mut checks = Checks::new(Arc::new(config), Arc::default());
    let port = free_port();
    checks.apply(vec![change("front", port, 1)]);
    // Closed without an answer, as soon as somebody listens at all.
    let closed = |answer: &io::Result<String>| match answer {
        Ok(text) => text.is_empty(),
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
    };
    let _ = until(port, "/", closed).await;
}
