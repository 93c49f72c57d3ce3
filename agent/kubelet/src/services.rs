//! The cluster's Services, for the environment variables that containers get from them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Service;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, ResourceExt};
use parking_lot::RwLock;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::shared::Shared;

/// What a variable needs to know of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    cluster_ip: String,
    /// Name, protocol, port.
    ports: Vec<(String, String, i32)>,
}

/// Namespace, then name: a pod gets those of its own namespace, and must not look at all others for it.
type Table = HashMap<String, HashMap<String, Entry>>;

/// All Services that have an address.
pub(crate) struct Services {
    table: RwLock<Table>,
    synced: watch::Sender<bool>,
}

impl Default for Services {
    fn default() -> Self {
        Self { table: RwLock::default(), synced: watch::Sender::new(false) }
    }
}

/// The API server's own Service.
const MASTER: (&str, &str) = ("default", "kubernetes");

impl Services {
    /// Waits until the Services have been read once.
    pub(crate) async fn synced(&self) {
        // The sender lives in self: waiting can't fail.
        let _ = self.synced.subscribe().wait_for(|synced| *synced).await;
    }

    /// Variables for a pod of `namespace`: the API server's always, those of its own namespace with `links`.
    pub(crate) fn variables(&self, namespace: &str, links: bool) -> BTreeMap<String, String> {
        let table = self.table.read();
        let mut variables = BTreeMap::new();
        if let Some(master) = table.get(MASTER.0).and_then(|own| own.get(MASTER.1)) {
            describe(MASTER.1, master, &mut variables);
        }
        if links {
            let own = table.get(namespace).into_iter().flatten();
            own.for_each(|(name, entry)| describe(name, entry, &mut variables));
        }
        variables
    }

    fn apply(&self, service: &Service) {
        put(&mut self.table.write(), service, entry(service));
    }

    fn remove(&self, service: &Service) {
        put(&mut self.table.write(), service, None);
    }
}

fn put(table: &mut Table, service: &Service, entry: Option<Entry>) {
    let (namespace, name) = (service.namespace().unwrap_or_default(), service.name_any());
    match entry {
        Some(entry) => drop(table.entry(namespace).or_default().insert(name, entry)),
        None => {
            let Some(own) = table.get_mut(&namespace) else { return };
            own.remove(&name);
            if own.is_empty() {
                table.remove(&namespace);
            }
        }
    }
}

fn entry(service: &Service) -> Option<Entry> {
    let spec = service.spec.as_ref()?;
    let cluster_ip = spec.cluster_ip.clone().filter(|ip| !ip.is_empty() && ip != "None")?;
    let ports = spec.ports.iter().flatten().map(|p| {
        (p.name.clone().unwrap_or_default(), p.protocol.clone().unwrap_or_else(|| "TCP".into()), p.port)
    });
    Some(Entry { cluster_ip, ports: ports.collect() })
}

fn describe(name: &str, entry: &Entry, variables: &mut BTreeMap<String, String>) {
    let shout = |text: &str| text.replace('-', "_").to_uppercase();
    let prefix = shout(name);
    let Some((_, first_protocol, first_port)) = entry.ports.first() else { return };
    let host = if entry.cluster_ip.contains(':') {
        format!("[{}]", entry.cluster_ip)
    } else {
        entry.cluster_ip.clone()
    };
    let mut set = |key: String, value: String| {
        variables.insert(key, value);
    };
    set(format!("{prefix}_SERVICE_HOST"), entry.cluster_ip.clone());
    set(format!("{prefix}_SERVICE_PORT"), first_port.to_string());
    set(format!("{prefix}_PORT"), format!("{}://{host}:{first_port}", first_protocol.to_lowercase()));
    for (port_name, protocol, port) in &entry.ports {
        if !port_name.is_empty() {
            set(format!("{prefix}_SERVICE_PORT_{}", shout(port_name)), port.to_string());
        }
        let link = format!("{prefix}_PORT_{port}_{}", protocol.to_uppercase());
        set(link.clone(), format!("{}://{host}:{port}", protocol.to_lowercase()));
        set(format!("{link}_PROTO"), protocol.to_lowercase());
        set(format!("{link}_PORT"), port.to_string());
        set(format!("{link}_ADDR"), entry.cluster_ip.clone());
    }
}

/// Follows the Services until shutdown.
pub(crate) async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    let api: Api<Service> = Api::all(shared.client.clone());
    let mut stream = std::pin::pin!(watcher(api, watcher::Config::default()).default_backoff());
    let mut listing = Table::new();
    loop {
        let event = tokio::select! {
            () = stop.cancelled() => return,
            event = stream.next() => event,
        };
        match event {
            Some(Ok(watcher::Event::Init)) => listing.clear(),
            Some(Ok(watcher::Event::InitApply(service))) => put(&mut listing, &service, entry(&service)),
            Some(Ok(watcher::Event::InitDone)) => {
                *shared.services.table.write() = std::mem::take(&mut listing);
                shared.services.synced.send_replace(true);
            }
            Some(Ok(watcher::Event::Apply(service))) => shared.services.apply(&service),
            Some(Ok(watcher::Event::Delete(service))) => shared.services.remove(&service),
            Some(Err(error)) => tracing::warn!(%error, "cannot watch services"),
            None => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn variables_are_upstreams() {
        let services = Services::default();
        let service = |ns: &str, name: &str, ip: &str, port: i32| {
            serde_json::from_value::<Service>(json!({"metadata": {"namespace": ns, "name": name},
                "spec": {"clusterIP": ip, "ports": [{"name": "web-ui", "port": port}]}}))
            .unwrap()
        };
        services.apply(&service("default", "kubernetes", "10.43.0.1", 443));
        services.apply(&service("shop", "my-db", "10.43.0.9", 5432));
        services.apply(&service("other", "x", "10.43.0.8", 1));
        services.apply(&service("shop", "headless", "None", 1));
        let without = services.variables("shop", false);
        assert_eq!(without["KUBERNETES_SERVICE_HOST"], "10.43.0.1");
        assert_eq!(without["KUBERNETES_PORT_443_TCP_ADDR"], "10.43.0.1");
        assert!(!without.contains_key("MY_DB_SERVICE_HOST"));
        let with = services.variables("shop", true);
        assert_eq!(with["MY_DB_SERVICE_PORT"], "5432");
        assert_eq!(with["MY_DB_SERVICE_PORT_WEB_UI"], "5432");
        assert_eq!(with["MY_DB_PORT"], "tcp://10.43.0.9:5432");
        assert!(!with.keys().any(|k| k.starts_with("X_") || k.starts_with("HEADLESS_")));
        services.remove(&service("shop", "my-db", "10.43.0.9", 5432));
        services.apply(&service("default", "kubernetes", "None", 443));
        assert!(services.variables("shop", true).is_empty());
        assert_eq!(services.table.read().len(), 1, "an empty namespace is kept");
    }
}
