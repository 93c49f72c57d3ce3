//! The contract on a real etcd, which the tests start on loopback, with and without TLS.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::contract;

/// False, saying why, if there is no etcd here; panics if `WEFT_REQUIRE` wants one.
fn have_etcd() -> bool {
    let found =
        Command::new("etcd").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        let required = std::env::var("WEFT_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|name| name == "etcd"), "etcd is required but not installed");
        eprintln!("SKIP: needs etcd");
    }
    found
}

struct Server {
    process: Child,
    url: String,
    args: Vec<String>,
    folder: tempfile::TempDir,
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Server {
    fn start(tls: Option<&Certificates>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let (url, peer) =
            (format!("{scheme}://127.0.0.1:{}", free_port()), format!("http://127.0.0.1:{}", free_port()));
        let mut args: Vec<String> = [
            "--data-dir",
            folder.path().to_str().unwrap(),
            "--listen-client-urls",
            &url,
            "--advertise-client-urls",
            &url,
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
            "--initial-cluster",
            &format!("default={peer}"),
            "--log-level",
            "error",
        ]
        .map(str::to_owned)
        .to_vec();
        if let Some(tls) = tls {
            let flags = [
                ("--cert-file", &tls.server),
                ("--key-file", &tls.server_key),
                ("--trusted-ca-file", &tls.ca),
            ];
            args.extend(
                flags
                    .into_iter()
                    .flat_map(|(flag, path)| [flag.to_owned(), path.to_str().unwrap().to_owned()]),
            );
            args.push("--client-cert-auth".to_owned());
        }
        Self { process: Self::spawn(&args), url, args, folder }
    }

    fn spawn(args: &[String]) -> Child {
        Command::new("etcd").args(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    fn restart(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.process = Self::spawn(&self.args);
    }

    async fn connect(&self, tls: Option<TlsOptions>, prefix: &str) -> EtcdStore {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match EtcdStore::connect(std::slice::from_ref(&self.url), tls.clone(), prefix).await {
                Ok(store) if store.current_revision().await.is_ok() => return store,
                Ok(_) => assert!(Instant::now() < deadline, "etcd has no leader"),
                Err(error) => assert!(Instant::now() < deadline, "etcd doesn't come up: {error:?}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        assert!(self.folder.path().exists());
    }
}

struct Certificates {
    ca: PathBuf,
    server: PathBuf,
    server_key: PathBuf,
    client: TlsOptions,
    _folder: tempfile::TempDir,
}

fn certificates() -> Certificates {
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    };
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
    let issue = |names: Vec<String>, usages: Vec<ExtendedKeyUsagePurpose>| {
        let mut params = CertificateParams::new(names).unwrap();
        params.extended_key_usages = usages;
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &ca).unwrap().pem(), key.serialize_pem())
    };
    // etcd's gRPC gateway dials its own listener with the server's certificate, so it must also do for a client.
    let both = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let server = issue(vec!["127.0.0.1".to_owned()], both);
    let client = issue(vec!["weft".to_owned()], vec![ExtendedKeyUsagePurpose::ClientAuth]);
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path: PathBuf = Path::join(folder.path(), name);
        std::fs::write(&path, text).unwrap();
        path
    };
    Certificates {
        ca: file("ca.pem", &ca.pem()),
        server: file("server.pem", &server.0),
        server_key: file("server.key", &server.1),
        client: TlsOptions {
            ca: ca.pem().into_bytes(),
            client: Some((client.0.into_bytes(), client.1.into_bytes())),
            server_name: None,
        },
        _folder: folder,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keeps_the_contract() {
    if !have_etcd() {
        return;
    }
    let server = Server::start(None);
    let mut store = server.connect(None, "/weft-test").await;
    // Debian's etcd is older than the ordering of requested progress reports; with one writer at a time they are in order.
    store.ask_progress = true;
    let progress: Arc<dyn Store> = Arc::new(store);
    contract::run(&progress, contract::PROGRESS).await;

    let store: Arc<dyn Store> = Arc::new(server.connect(None, "/weft-test").await);
    contract::run(&store, contract::TOGETHER).await;
    contract::run(&store, contract::ALONE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn speaks_tls_with_client_certificates() {
    if !have_etcd() {
        return;
    }
    let certificates = certificates();
    let server = Server::start(Some(&certificates));
    let store: Arc<dyn Store> = Arc::new(server.connect(Some(certificates.client.clone()), "").await);
    contract::run(&store, contract::TOGETHER).await;

    let stranger = TlsOptions { client: None, ..certificates.client.clone() };
    let refused = EtcdStore::connect(std::slice::from_ref(&server.url), Some(stranger), "").await;
    assert!(matches!(refused, Err(Error::Unavailable { .. })));
    let other_ca = TlsOptions { ca: super::tests::certificates().client.ca, ..certificates.client.clone() };
    let refused = EtcdStore::connect(std::slice::from_ref(&server.url), Some(other_ca), "").await;
    assert!(matches!(refused, Err(Error::Unavailable { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_outlives_the_server() {
    if !have_etcd() {
        return;
    }
    let mut server = Server::start(None);
    let store = server.connect(None, "/weft-test").await;
    let put = |n: u32| Op::Put { key: format!("/a/{n}"), value: Bytes::from(n.to_string()) };
    let mut watch = store.watch(Range::prefix("/a/"), Revision(0)).await.unwrap();
    store.txn(vec![], vec![put(0)]).await.unwrap();
    server.restart();
    let again = server.connect(None, "/weft-test").await;
    for n in 1..10 {
        again.txn(vec![], vec![put(n)]).await.unwrap();
    }
    let mut seen = Vec::new();
    let collect = async {
        use futures::StreamExt;
        while seen.len() < 10 {
            let batch = watch.next().await.unwrap().unwrap();
            seen.extend(batch.events.iter().map(|event| event.key().to_owned()));
        }
    };
    tokio::time::timeout(Duration::from_secs(30), collect).await.unwrap();
    assert_eq!(seen, (0..10).map(|n| format!("/a/{n}")).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_prefixes_do_not_meet() {
    if !have_etcd() {
        return;
    }
    let server = Server::start(None);
    let (one, two) = (server.connect(None, "/one").await, server.connect(None, "/two").await);
    let put =
        |value: &'static str| Op::Put { key: "/k".to_owned(), value: Bytes::from_static(value.as_bytes()) };
    one.txn(vec![Condition::Absent("/k".to_owned())], vec![put("1")]).await.unwrap();
    two.txn(vec![Condition::Absent("/k".to_owned())], vec![put("2")]).await.unwrap();
    let everything = Range { start: String::new(), end: None };
    let page = one.range(everything.clone(), Revision(0), 0).await.unwrap();
    assert_eq!(page.items.iter().map(|kv| &kv.value[..]).collect::<Vec<_>>(), [b"1"]);
    let page = two.range(everything, Revision(0), 0).await.unwrap();
    assert_eq!(page.items.iter().map(|kv| &kv.value[..]).collect::<Vec<_>>(), [b"2"]);
}
