//! A port for each Service with externalTrafficPolicy Local, where a load balancer asks whether to send traffic to this node
//! (healthCheckNodePort).

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use axum::Router;
use axum::http::{HeaderName, HeaderValue};
use axum::response::Response;
use serde_json::json;
use tokio::task::AbortHandle;

use super::{ProxyConfig, Selected, Shared, answer, bind, listen_everywhere, log_end};
use crate::desired::Health;
use crate::tables::ServiceName;

/// By this a load balancer can share out traffic by the number of endpoints.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// The ports that are served.
#[derive(Debug)]
pub(crate) struct Checks {
    config: Arc<ProxyConfig>,
    shared: Arc<Shared>,
    served: HashMap<ServiceName, Served>,
}

#[derive(Debug)]
struct Served {
    port: u16,
    local_endpoints: Arc<AtomicUsize>,
    server: AbortHandle,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Checks {
    pub(crate) fn new(config: Arc<ProxyConfig>, shared: Arc<Shared>) -> Self {
        Self { config, shared, served: HashMap::new() }
    }

    /// Takes in what changed. A port may pass from one Service to another at once: those that go go first.
    pub(crate) fn apply(&mut self, changes: Vec<(ServiceName, Option<Health>)>) {
        let same = |served: &Served, health: &Option<Health>| health.is_some_and(|h| h.port == served.port);
        for (name, health) in &changes {
            if self.served.get(name).is_some_and(|served| !same(served, health)) {
                self.served.remove(name);
            }
        }
        for (name, health) in changes {
            let Some(health) = health else { continue };
            let served = self.served.entry(name.clone()).or_insert_with(|| {
                let local_endpoints = Arc::new(AtomicUsize::new(0));
                let serving = serve(
                    name,
                    health.port,
                    Arc::clone(&local_endpoints),
                    Arc::clone(&self.config),
                    Arc::clone(&self.shared),
                );
                Served { port: health.port, local_endpoints, server: tokio::spawn(serving).abort_handle() }
            });
            served.local_endpoints.store(health.local_endpoints, Ordering::Relaxed);
        }
    }
}

async fn serve(
    name: ServiceName,
    port: u16,
    local_endpoints: Arc<AtomicUsize>,
    config: Arc<ProxyConfig>,
    shared: Arc<Shared>,
) {
    let what = format!("the health check of service {name}");
    let tell = move || {
        let healthy = shared.health.lock().is_healthy(Instant::now());
        std::future::ready(say(&name, local_endpoints.load(Ordering::Relaxed), healthy))
    };
    // Load balancers ask any path.
    let router = Router::new().fallback(tell);
    loop {
        let listener = bind(&what, || listen_everywhere(port)).await;
        let selected = Selected { listener, config: Arc::clone(&config) };
        log_end(axum::serve(selected, router.clone()).await);
    }
}

fn say(name: &ServiceName, local_endpoints: usize, healthy: bool) -> Response {
    let body = json!({
        "service": {"namespace": name.namespace(), "name": name.name()},
        "localEndpoints": local_endpoints,
        "serviceProxyHealthy": healthy,
    });
    let mut response = answer(local_endpoints > 0 && healthy, body.to_string());
    response.headers_mut().insert(WEIGHT, HeaderValue::from(local_endpoints));
    response
}
