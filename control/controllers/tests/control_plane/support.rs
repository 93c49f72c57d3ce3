//! Owns a control plane in this process and a stand-in for its kubelets.

use futures::TryStreamExt;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use kube::{Client, ResourceExt};
use parking_lot::Mutex;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, SanType,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use weft_control_apiserver::{
    CertifiedKeyPem, Config, DEFAULT_MAX_REQUEST_BYTES, Server, ServiceAccountKeys,
};
use weft_control_store::embedded::{EmbeddedStore, Options};

/// Far beyond what anything here takes, for a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);

pub(crate) struct Plane {
    pub(crate) admin: Client,
    pub(crate) shutdown: CancellationToken,
    /// Nodes whose kubelet is silent.
    pub(crate) silent: Arc<Mutex<HashSet<String>>>,
    server: Arc<Server>,
    tasks: JoinSet<()>,
    ca: String,
    identity: CertifiedKeyPem,
    dir: tempfile::TempDir,
}

/// A CA, and what it signed: the server's identity, and an admin's.
fn authority() -> (String, CertifiedKeyPem, CertifiedKeyPem) {
    let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let ca = params.self_signed(&key).unwrap().pem();
    let issuer = Issuer::new(params, key);
    let sign = |mut params: CertificateParams| {
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &issuer).unwrap();
        CertifiedKeyPem { certificates: leaf.pem(), key: key.serialize_pem() }
    };
    let mut server = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    server.subject_alt_names.push(SanType::IpAddress("127.0.0.1".parse().unwrap()));
    let mut admin = CertificateParams::default();
    admin.distinguished_name = DistinguishedName::new();
    admin.distinguished_name.push(DnType::CommonName, "admin");
    admin.distinguished_name.push(DnType::OrganizationName, "system:masters");
    (ca, sign(server), sign(admin))
}

impl Plane {
    /// A control plane with so many nodes, whose kubelets must speak at least every `grace`.
    pub(crate) async fn start(nodes: usize, grace: Duration) -> Self {
        if let Ok(filter) = std::env::var("RUST_LOG") {
            let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
        }
        let dir = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open(dir.path().join("store"), Options::default()).unwrap();
        let (ca, serving, identity) = authority();
        let config = Config {
            advertise_address: "192.0.2.10".parse().unwrap(),
            advertise_port: 6443,
            serving,
            client_ca: ca.clone(),
            service_accounts: ServiceAccountKeys {
                signing_key: KeyPair::generate().unwrap().serialize_pem(),
                verification_keys: Vec::new(),
                issuer: "https://kubernetes.default.svc.cluster.local".into(),
                audiences: Vec::new(),
            },
            service_cidrs: vec!["10.43.0.0/16".parse().unwrap(), "fd43::/112".parse().unwrap()],
            node_port_range: 30000..=32767,
            kubelet_client: None,
            cluster_domain: "cluster.local".into(),
            max_request_bytes: DEFAULT_MAX_REQUEST_BYTES,
            event_ttl: Duration::from_secs(3600),
            compaction_interval: Duration::from_secs(300),
        };
        let server = Arc::new(Server::start(config, Arc::new(store)).await.unwrap());
        let admin = server.client("admin", &["system:masters", "system:authenticated"]);
        let mut plane = Self {
            admin,
            shutdown: CancellationToken::new(),
            silent: Arc::default(),
            server,
            tasks: JoinSet::new(),
            identity,
            ca: ca.clone(),
            dir,
        };
        plane.spawn_control(ca, grace);
        for n in 0..nodes {
            plane.add_node(&format!("node-{n}"), "4", grace).await;
        }
        plane.spawn_kubelet();
        let api: &Api<Node> = &Api::all(plane.admin.clone());
        eventually("the nodes are free of taints", || async move {
            let all = api.list(&ListParams::default()).await.unwrap().items;
            let tainted =
                |n: &Node| n.spec.as_ref().is_some_and(|s| s.taints.as_ref().is_some_and(|t| !t.is_empty()));
            (!all.iter().any(tainted)).then_some(())
        })
        .await;
        plane
    }

    fn spawn_control(&mut self, ca: String, grace: Duration) {
        let config = weft_control_controllers::Config {
            cluster_cidrs: ["10.42.0.0/16", "fd42::/56"].map(|range| range.parse().unwrap()).into(),
            service_cidrs: vec!["10.43.0.0/16".parse().unwrap()],
            load_balancer_pools: vec!["192.0.2.0/29".parse().unwrap()],
            root_ca_pem: ca,
            identity: "test".into(),
            leader_election: true,
            node_monitor_grace: grace,
        };
        let server = self.server.clone();
        let clients = move |name: &str| match name {
            weft_control_controllers::MANAGER => {
                server.client("system:kube-controller-manager", &["system:authenticated"])
            }
            name => {
                assert!(weft_control_controllers::CONTROLLERS.contains(&name), "{name} isn't announced");
                let groups =
                    ["system:serviceaccounts", "system:serviceaccounts:kube-system", "system:authenticated"];
                server.client(&format!("system:serviceaccount:kube-system:{name}"), &groups)
            }
        };
        let stop = self.shutdown.clone();
        self.tasks.spawn(async move { weft_control_controllers::run(config, clients, stop).await.unwrap() });
        let client = self.server.client("system:kube-scheduler", &["system:authenticated"]);
        let stop = self.shutdown.clone();
        let config = weft_control_scheduler::Config::default();
        self.tasks.spawn(async move { weft_control_scheduler::run(config, client, stop).await.unwrap() });
    }

    pub(crate) async fn add_node(&mut self, name: &str, cpu: &str, grace: Duration) {
        let api: Api<Node> = Api::all(self.admin.clone());
        let taint = json!({"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"});
        let node = json!({"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            "spec": {"taints": [taint]}});
        api.create(&PostParams::default(), &serde_json::from_value(node).unwrap()).await.unwrap();
        let room = json!({"cpu": cpu, "memory": "8Gi", "pods": "110", "ephemeral-storage": "10Gi"});
        let status = json!({"status": {"capacity": room, "allocatable": room, "conditions": [{
            "type": "Ready", "status": "True", "reason": "KubeletReady",
            "lastHeartbeatTime": now(), "lastTransitionTime": now()}]}});
        api.patch_status(name, &PatchParams::default(), &Patch::Strategic(status)).await.unwrap();
        let (client, stop, silent) = (self.admin.clone(), self.shutdown.clone(), self.silent.clone());
        let name = name.to_owned();
        self.tasks.spawn(async move { renew_lease(client, &name, grace / 4, stop, silent).await });
    }

    fn spawn_kubelet(&mut self) {
        let (client, stop, silent) = (self.admin.clone(), self.shutdown.clone(), self.silent.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = play_kubelet(client, silent) => {}
            }
        });
    }

    pub(crate) fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>,
    {
        Api::namespaced(self.admin.clone(), "default")
    }

    pub(crate) async fn create<K>(&self, object: Value) -> K
    where
        K: kube::Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + DeserializeOwned
            + serde::Serialize,
    {
        let object: K = serde_json::from_value(object).unwrap();
        self.api().create(&PostParams::default(), &object).await.unwrap()
    }

    /// The pods of `app=<app>` that aren't being deleted.
    pub(crate) async fn pods(&self, app: &str) -> Vec<Pod> {
        let list =
            self.api::<Pod>().list(&ListParams::default().labels(&format!("app={app}"))).await.unwrap();
        list.items.into_iter().filter(|p| p.metadata.deletion_timestamp.is_none()).collect()
    }

    pub(crate) async fn events(&self, reason: &str) -> Vec<String> {
        let api: Api<k8s_openapi::api::core::v1::Event> = self.api();
        let all = api.list(&ListParams::default()).await.unwrap();
        all.items
            .into_iter()
            .filter(|e| e.reason.as_deref() == Some(reason))
            .filter_map(|e| e.message)
            .collect()
    }

    /// Serves the API on a loopback port; returns the kubeconfig of an admin.
    pub(crate) async fn serve(&mut self) -> std::path::PathBuf {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        let (server, stop) = (self.server.clone(), self.shutdown.clone());
        self.tasks.spawn(async move { server.serve(listener, stop).await.unwrap() });
        let file = |name: &str, text: &str| {
            let path = self.dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let (ca, cert) = (file("ca.pem", &self.ca), file("cert.pem", &self.identity.certificates));
        let key = file("key.pem", &self.identity.key);
        let config = json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": url, "certificate-authority": ca}}],
            "users": [{"name": "u", "user": {"client-certificate": cert, "client-key": key}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}]});
        file("kubeconfig", &config.to_string())
    }

    pub(crate) async fn stop(mut self) {
        self.shutdown.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
        self.server.stop().await;
    }
}

fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

async fn renew_lease(
    client: Client,
    name: &str,
    every: Duration,
    stop: CancellationToken,
    silent: Arc<Mutex<HashSet<String>>>,
) {
    let api: Api<k8s_openapi::api::coordination::v1::Lease> = Api::namespaced(client, "kube-node-lease");
    let lease =
        json!({"metadata": {"name": name}, "spec": {"holderIdentity": name, "leaseDurationSeconds": 40}});
    api.create(&PostParams::default(), &serde_json::from_value(lease).unwrap()).await.unwrap();
    loop {
        if !silent.lock().contains(name) {
            let time = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string();
            let patch = Patch::Merge(json!({"spec": {"renewTime": time}}));
            api.patch(name, &PatchParams::default(), &patch).await.unwrap();
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(every) => {}
        }
    }
}

/// Reports bound pods as running and ready at once, and confirms the end of deleted ones.
async fn play_kubelet(client: Client, silent: Arc<Mutex<HashSet<String>>>) {
    let next = AtomicU32::new(2);
    let api: Api<Pod> = Api::all(client.clone());
    let mut version = "0".to_owned();
    loop {
        let mut events = Box::pin(api.watch(&WatchParams::default(), &version).await.unwrap());
        while let Some(event) = events.try_next().await.unwrap() {
            let (WatchEvent::Added(pod) | WatchEvent::Modified(pod)) = event else { continue };
            version = pod.resource_version().unwrap_or_default();
            report(&client, &pod, &next, &silent).await;
        }
    }
}

async fn report(client: &Client, pod: &Pod, next: &AtomicU32, silent: &Mutex<HashSet<String>>) {
    let node = pod.spec.as_ref().and_then(|s| s.node_name.clone()).unwrap_or_default();
    if node.is_empty() || silent.lock().contains(&node) {
        return;
    }
    let api: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap());
    if pod.metadata.deletion_timestamp.is_some() {
        let _ = api.delete(&pod.name_any(), &DeleteParams::default().grace_period(0)).await;
        return;
    }
    if pod.status.as_ref().is_some_and(|s| s.phase.as_deref() == Some("Running")) {
        return;
    }
    let n = next.fetch_add(1, Ordering::Relaxed);
    let ip = format!("10.42.{}.{}", n / 250, n % 250);
    let status = json!({"status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": [
        {"type": "Ready", "status": "True", "lastTransitionTime": now()}]}});
    let _ = api.patch_status(&pod.name_any(), &PatchParams::default(), &Patch::Strategic(status)).await;
}

/// Polls until `check` yields something; panics with `what` after the deadline.
pub(crate) async fn eventually<T, F, Fut>(what: &str, check: F) -> T
where
    F: Fn() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let start = Instant::now();
    loop {
        if let Some(value) = check().await {
            return value;
        }
        assert!(start.elapsed() < DEADLINE, "not seen: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(crate) fn deployment(name: &str, replicas: i32, image: &str) -> Value {
    json!({"metadata": {"name": name, "labels": {"app": name}}, "spec": {
        "replicas": replicas, "selector": {"matchLabels": {"app": name}},
        "template": {"metadata": {"labels": {"app": name}}, "spec": {"containers": [
            {"name": "main", "image": image, "ports": [{"name": "www", "containerPort": 8080}]}]}}}})
}
