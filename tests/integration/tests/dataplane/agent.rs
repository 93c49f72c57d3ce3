//! The whole dataplane as the agent runs it, fed by lists and watches of an API in memory.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::BoxBody};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use weft_agent_dataplane::overlay::Routing;
use weft_agent_dataplane::report::Report;
use weft_agent_dataplane::{Config, PodNetwork, ProxyConfig, cleanup, run};
use weft_tests_harness::{artifact, require};

use crate::NEEDS;
use crate::place::{NODE, POD, Place, ask_datagram, ask_tcp, connected_udp, serve, vip, within};

type Reply = http::Response<BoxBody<Bytes, Infallible>>;

/// Three lists, and the watches that are open on them.
#[derive(Clone, Default)]
pub(crate) struct Api {
    lists: Arc<Mutex<BTreeMap<String, Vec<Value>>>>,
    watches: Arc<Mutex<BTreeMap<String, mpsc::UnboundedSender<Bytes>>>>,
    created: Arc<Mutex<Vec<Value>>>,
}

impl Api {
    pub(crate) fn list(&self, plural: &str, objects: Vec<Value>) {
        self.lists.lock().unwrap().insert(plural.to_owned(), objects);
    }

    /// Sends an event to the watch, once it is open.
    pub(crate) async fn event(&self, plural: &str, kind: &str, object: &Value) {
        let line = Bytes::from(format!("{}\n", json!({"type": kind, "object": object})));
        for _ in 0..500 {
            let sent = self.watches.lock().unwrap().get(plural).is_some_and(|w| w.send(line.clone()).is_ok());
            if sent {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("nobody watches {plural}");
    }

    /// What was created so far.
    pub(crate) fn created(&self) -> Vec<Value> {
        self.created.lock().unwrap().clone()
    }

    /// Takes in what is created.
    async fn create(&self, request: http::Request<kube::client::Body>) -> Reply {
        let body = request.into_body().collect_bytes().await.unwrap();
        self.created.lock().unwrap().push(serde_json::from_slice(&body).unwrap());
        http::Response::builder().status(201).body(Full::new(body).boxed()).unwrap()
    }

    fn answer(&self, request: &http::Request<kube::client::Body>) -> Reply {
        let plural = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        if request.uri().query().unwrap_or_default().contains("watch=true") {
            let (sender, receiver) = mpsc::unbounded_channel();
            self.watches.lock().unwrap().insert(plural, sender);
            let lines =
                futures::stream::unfold(receiver, |mut r| async { r.recv().await.map(|line| (line, r)) });
            let body = StreamBody::new(lines.map(|line| Ok(http_body::Frame::data(line))));
            return http::Response::new(BoxBody::new(body));
        }
        let lists = self.lists.lock().unwrap();
        let mut words = request.uri().path().rsplit('/').skip(1);
        let named = |object: &&Value| object["metadata"]["name"] == plural.as_str();
        let one = words.next().and_then(|plural| lists.get(plural)?.iter().find(named));
        if let Some(one) = one {
            return http::Response::new(Full::new(Bytes::from(one.to_string())).boxed());
        }
        let items = lists.get(&plural).cloned().unwrap_or_default();
        let list = json!({"metadata": {"resourceVersion": "7"}, "items": items});
        http::Response::new(Full::new(Bytes::from(list.to_string())).boxed())
    }

    pub(crate) fn client(&self) -> kube::Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
            let api = api.clone();
            async move {
                let create = request.method() == http::Method::POST;
                Ok::<_, Infallible>(if create { api.create(request).await } else { api.answer(&request) })
            }
        });
        kube::Client::new(service, "default")
    }
}

pub(crate) fn service() -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": "web", "resourceVersion": "5"},
        "spec": {"type": "NodePort", "clusterIP": "10.43.0.10", "ports": [
            {"name": "stream", "port": 80, "nodePort": 30080, "protocol": "TCP"},
            {"name": "datagram", "port": 80, "nodePort": 30080, "protocol": "UDP"}]}})
}

pub(crate) fn slice(endpoints: &[SocketAddr], version: &str) -> Value {
    let port = endpoints.first().map_or(1, SocketAddr::port);
    let endpoints: Vec<_> =
        endpoints.iter().map(|e| json!({"addresses": [e.ip()], "conditions": {"ready": true}})).collect();
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4", "endpoints": endpoints,
        "metadata": {"namespace": "default", "name": "web-1", "resourceVersion": version,
            "labels": {"kubernetes.io/service-name": "web"}},
        "ports": [{"name": "stream", "port": port, "protocol": "TCP"}, {"name": "datagram", "port": port, "protocol": "UDP"}]})
}

pub(crate) fn config(place: &Place) -> Config {
    config_of(place.node.name(), &place.pins)
}

/// Of the node in a namespace of this name.
pub(crate) fn config_of(netns: &str, pins: &Path) -> Config {
    let object = std::fs::read(artifact("weft.bpf.o").unwrap()).unwrap();
    Config {
        node_name: "node-a".to_owned(),
        node_ip: NODE.into(),
        cluster_cidr: vec!["10.42.0.0/16".parse().unwrap()],
        service_cidr: vec!["10.43.0.0/16".parse().unwrap()],
        node_local: vec![],
        pin_dir: pins.to_owned(),
        node_cgroup: PathBuf::from("weft").join(netns),
        ebpf_object: object.leak(),
        gate: Some(weft_agent_dataplane::policy::Gate::default()),
        proxy: ProxyConfig::default(),
        balancer_pools: Vec::new(),
        pod_network: PodNetwork::Own,
        routing: Routing::Tunnel,
        direct_return: false,
        reports: None,
    }
}

/// Asks the proxy's own HTTP servers.
pub(crate) async fn get(port: u16, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// Asks until the answer is as wanted: an event takes its time to the maps.
pub(crate) async fn eventually(what: &str, mut wanted: impl FnMut() -> bool) {
    for _ in 0..500 {
        if wanted() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} does not happen");
}

#[test]
fn objects_become_services_and_survive_the_agent() {
    if !require("dataplane::agent", &NEEDS) {
        return;
    }
    let place = Place::new("ag").unwrap();
    let pod = serve(&place.pod, POD, "pod");
    let api = Api::default();
    api.list("services", vec![service()]);
    api.list("endpointslices", vec![slice(&[pod], "6")]);
    let config = config(&place);
    within(&place.node, || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(life(&api, &config, pod));
        // Nobody runs any more, and the maps still do.
        assert!(ask_tcp(vip(10)).is_ok());
        runtime.block_on(cleanup(&config)).unwrap();
        runtime.block_on(cleanup(&config)).unwrap();
        assert_eq!(ask_tcp(vip(10)).unwrap_err().kind(), ErrorKind::NetworkUnreachable);
        assert!(!place.cgroup.exists());
        assert!(!config.pin_dir.join("maps").exists() && !config.pin_dir.join("links").exists());
    });
}

/// A Service that does not fit is told of, costs no other anything, and is in its place as soon as it fits.
async fn too_many_ranges(api: &Api, pod: SocketAddr, reports: &watch::Receiver<Report>) {
    let ranges = |count: u32| -> Vec<String> {
        (0..count).map(|i| format!("10.{}.{}.{}/32", i / 65_536, i / 256 % 256, i % 256)).collect()
    };
    let guarded = |ranges: Vec<String>, version: &str| {
        let mut object = service();
        object["metadata"] =
            json!({"namespace": "default", "name": "guarded", "uid": "u-1", "resourceVersion": version});
        object["spec"] = json!({"type": "LoadBalancer", "clusterIP": "10.43.0.11", "loadBalancerSourceRanges": ranges,
            "ports": [{"name": "stream", "port": 80, "protocol": "TCP"}]});
        object["status"] = json!({"loadBalancer": {"ingress": [{"ip": "203.0.113.11"}]}});
        object
    };
    let mut of_guarded = slice(&[pod], "20");
    of_guarded["metadata"]["name"] = "guarded-1".into();
    of_guarded["metadata"]["labels"]["kubernetes.io/service-name"] = "guarded".into();
    // Each range stands in two lists.
    let large = guarded(ranges(weft_ebpf_abi::sizes::SOURCES / 2 + 10), "21");
    api.list("services", vec![service(), large.clone()]);
    api.event("endpointslices", "ADDED", &of_guarded).await;
    api.event("services", "ADDED", &large).await;
    eventually("an Event", || !api.created.lock().unwrap().is_empty()).await;
    let event = api.created.lock().unwrap()[0].clone();
    assert_eq!((&event["type"], &event["reason"]), (&json!("Warning"), &json!("FailedToProgram")), "{event}");
    assert_eq!(
        (&event["regarding"]["name"], &event["regarding"]["uid"]),
        (&json!("guarded"), &json!("u-1")),
        "{event}"
    );
    assert!(event["note"].as_str().unwrap().contains("weft_src_2 is full"), "{event}");
    assert!(get(10_249, "/metrics").await.contains("weft_dataplane_services_unprogrammed 1"));
    assert!(ask_tcp(vip(11)).is_err(), "no address before its ranges");
    let failing = || reports.borrow().failing.values().cloned().collect::<Vec<_>>();
    eventually("a report of it", || failing().iter().any(|reason| reason.contains("weft_src_2 is full")))
        .await;
    assert_eq!((failing().len(), reports.borrow().version, reports.borrow().awaited), (1, 21, 21));
    assert!(ask_tcp(vip(10)).is_ok());
    api.event("endpointslices", "MODIFIED", &slice(&[], "22")).await;
    eventually(
        "refusal meanwhile",
        || matches!(ask_tcp(vip(10)), Err(e) if e.kind() == ErrorKind::ConnectionRefused),
    )
    .await;
    api.event("services", "MODIFIED", &guarded(ranges(3), "23")).await;
    eventually("the Service that fits", || ask_tcp(vip(11)).is_ok()).await;
    assert!(get(10_249, "/metrics").await.contains("weft_dataplane_services_unprogrammed 0"));
    eventually("a report of that", || failing().is_empty() && reports.borrow().version == 23).await;
    api.event("endpointslices", "MODIFIED", &slice(&[pod], "24")).await;
    eventually("the endpoint's return", || ask_tcp(vip(10)).is_ok()).await;
}

async fn life(api: &Api, config: &Config, pod: SocketAddr) {
    let shutdown = CancellationToken::new();
    let (programmed, mut is_programmed) = watch::channel(false);
    let (report, reports) = watch::channel(Report::default());
    let config = Config { reports: Some(report), ..config.clone() };
    let running = tokio::spawn(run(config, api.client(), programmed, shutdown.clone()));
    tokio::time::timeout(Duration::from_secs(10), is_programmed.wait_for(|is| *is)).await.unwrap().unwrap();
    assert!(ask_tcp(vip(10)).is_ok(), "it said that Services are live");
    assert!(ask_tcp(SocketAddr::from(([127, 0, 0, 1], 30080))).is_ok());
    let health = get(10_256, "/healthz").await;
    assert!(health.starts_with("HTTP/1.1 200") && health.contains("\"nodeEligible\":true"), "{health}");

    let datagrams = connected_udp(vip(10));
    assert!(ask_datagram(&datagrams).is_ok());
    api.event("endpointslices", "MODIFIED", &slice(&[], "8")).await;
    eventually("refusal", || matches!(ask_tcp(vip(10)), Err(e) if e.kind() == ErrorKind::ConnectionRefused))
        .await;
    let ended = || matches!(datagrams.take_error(), Ok(Some(e)) if e.kind() == ErrorKind::ConnectionAborted);
    eventually("the end of a connected UDP socket", ended).await;
    api.event("endpointslices", "MODIFIED", &slice(&[pod], "9")).await;
    eventually("the endpoint's return", || ask_tcp(vip(10)).is_ok()).await;
    let metrics = get(10_249, "/metrics").await;
    for line in [
        "weft_dataplane_drops_total{reason=\"socket_no_endpoints\"}",
        "weft_dataplane_services 1",
        "weft_map_entries{map=\"backends\"} 2",
        "kubeproxy_sync_full_proxy_rules_duration_seconds_count 1",
        "kubeproxy_sync_proxy_rules_endpoint_changes_total 3",
    ] {
        assert!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }
    // What can't be read changes nothing, and keeps nothing behind it back.
    let mut unreadable = slice(&[], "10");
    unreadable["ports"] = "nonsense".into();
    api.event("endpointslices", "MODIFIED", &unreadable).await;
    api.event("services", "DELETED", &service()).await;
    eventually("removal", || matches!(ask_tcp(vip(10)), Err(e) if e.kind() == ErrorKind::NetworkUnreachable))
        .await;
    api.event("services", "ADDED", &service()).await;
    eventually("the Service's return", || ask_tcp(vip(10)).is_ok()).await;

    too_many_ranges(api, pod, &reports).await;

    shutdown.cancel();
    tokio::time::timeout(Duration::from_secs(5), running).await.unwrap().unwrap().unwrap();
}
