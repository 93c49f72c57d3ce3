//! What the proxy serves over HTTP, at kube-proxy's ports and paths: its health, its metrics, and for each Service with
//! externalTrafficPolicy Local how many endpoints this node has.

mod checks;
#[cfg(test)]
mod tests;

pub(crate) use checks::Checks;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use ipnetwork::IpNetwork;
use k8s_openapi::jiff::Timestamp;
use parking_lot::Mutex;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::registry::Registry;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};

use crate::counts::Counted;
use crate::health::ProxyHealth;
use crate::metrics::Metrics;
use crate::xdp::Xdp;

/// First and longest wait before a port that is taken is tried again.
const BIND_FIRST: Duration = Duration::from_millis(50);
const BIND_LONGEST: Duration = Duration::from_secs(5);

/// What the proxy is told of addresses; the defaults are kube-proxy's.
#[derive(Clone, Debug)]
pub struct ProxyConfig {
    /// Only addresses of the node in these ranges answer NodePorts (`nodePortAddresses`); none stands for all.
    pub node_port_addresses: Vec<IpNetwork>,
    /// The address of `/healthz` and `/livez`; `None` if they are switched off.
    pub health: Option<SocketAddr>,
    /// The address of `/metrics`; `None` if it is switched off.
    pub metrics: Option<SocketAddr>,
    /// Where XDP carries packets from outside to this node's pods.
    pub xdp: Xdp,
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self {
            node_port_addresses: Vec::new(),
            health: Some(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 10_256)),
            metrics: Some(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 10_249)),
            xdp: Xdp::default(),
        }
    }
}

impl ProxyConfig {
    /// Whether an address of the node answers NodePorts.
    #[must_use]
    pub fn answers(&self, address: IpAddr) -> bool {
        let ranges = &self.node_port_addresses;
        ranges.is_empty() || ranges.iter().any(|range| range.contains(address))
    }
}

/// What the servers share with the dataplane.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    pub(crate) health: Mutex<ProxyHealth>,
    pub(crate) metrics: Metrics,
}

/// Serves health and metrics until it is dropped; it never ends.
pub(crate) async fn serve(config: &ProxyConfig, shared: Arc<Shared>, counted: Option<Counted>) {
    let health = Router::new().route("/healthz", get(healthz)).route("/livez", get(livez));
    let mut registry = Registry::default();
    shared.metrics.register(&mut registry);
    let registry = Arc::new(registry);
    let metrics = Router::new()
        .route("/healthz", get(|| async { "ok" }))
        // kube-proxy says "iptables", "ipvs" or "nftables" here.
        .route("/proxyMode", get(|| async { "ebpf" }))
        .route("/metrics", get(move || tell_metrics(Arc::clone(&registry), counted.clone())));
    let at = |address: Option<SocketAddr>, router: Router| async move {
        let Some(address) = address else { return std::future::pending().await };
        loop {
            let listener = bind("the service proxy's HTTP server", || TcpListener::bind(address)).await;
            log_end(axum::serve(listener, router.clone()).await);
        }
    };
    tokio::join!(at(config.health, health.with_state(Arc::clone(&shared))), at(config.metrics, metrics));
}

fn log_end(result: io::Result<()>) {
    if let Err(error) = result {
        tracing::warn!(%error, "an HTTP server of the service proxy ended, will be started again");
    }
}

/// Binds until it succeeds: what holds the port may be a predecessor that is about to end.
async fn bind<F: Future<Output = io::Result<TcpListener>>>(
    what: &str,
    listen: impl Fn() -> F,
) -> TcpListener {
    let mut wait = BIND_FIRST;
    loop {
        match listen().await {
            Ok(listener) => return listener,
            Err(error) if wait == BIND_LONGEST => {
                tracing::warn!(%error, "cannot listen for {what}, still trying")
            }
            Err(error) => tracing::debug!(%error, "cannot listen for {what} yet"),
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(BIND_LONGEST);
    }
}

/// A socket that listens at all addresses of both families, or of IPv4 where the kernel has no IPv6.
async fn listen_everywhere(port: u16) -> io::Result<TcpListener> {
    match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await
        }
        outcome => outcome,
    }
}

/// A listener that talks at some of the node's addresses only. They may come and go, so each connection is asked.
struct Selected {
    listener: TcpListener,
    config: Arc<ProxyConfig>,
}

impl axum::serve::Listener for Selected {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (stream, from) = axum::serve::Listener::accept(&mut self.listener).await;
            if stream.local_addr().is_ok_and(|at| self.config.answers(at.ip().to_canonical())) {
                return (stream, from);
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

fn answer(good: bool, body: String) -> Response {
    let status = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let kind = [(header::CONTENT_TYPE, "application/json"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    (status, kind, body).into_response()
}

async fn healthz(State(shared): State<Arc<Shared>>) -> Response {
    let health = *shared.health.lock();
    let eligible = health.is_eligible();
    let good = health.is_healthy(Instant::now()) && eligible;
    shared.metrics.health_asked("healthz", good);
    let now = Timestamp::now().to_string();
    let updated = shared.metrics.last_updated(good);
    let body = json!({"lastUpdated": updated, "currentTime": now, "nodeEligible": eligible});
    answer(good, body.to_string())
}

async fn livez(State(shared): State<Arc<Shared>>) -> Response {
    let good = shared.health.lock().is_healthy(Instant::now());
    shared.metrics.health_asked("livez", good);
    let now = Timestamp::now().to_string();
    let body = json!({"lastUpdated": shared.metrics.last_updated(good), "currentTime": now});
    answer(good, body.to_string())
}

async fn tell_metrics(registry: Arc<Registry>, counted: Option<Counted>) -> Response {
    let mut services = Registry::default();
    if let Some(counted) = counted {
        match counted.read().await {
            Ok(counts) => services.register_collector(Box::new(counts)),
            Err(error) => tracing::warn!(%error, "counts of Services are left out of the metrics"),
        }
    }
    encode(&[&registry, &services])
}

fn encode(registries: &[&Registry]) -> Response {
    let mut text = String::new();
    let parts = registries.iter().try_for_each(|registry| encode_registry(&mut text, registry));
    match parts.and_then(|()| encode_eof(&mut text)) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
