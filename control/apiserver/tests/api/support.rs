//! Owns a server on a loopback port with certificates of its own, and kubectl and HTTP against it.

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use weft_control_apiserver::{
    CertifiedKeyPem, Config, DEFAULT_MAX_REQUEST_BYTES, KubeletClient, Server, ServiceAccountKeys,
};
use weft_control_store::embedded::{EmbeddedStore, Options};

/// A cluster's authority.
pub(crate) struct Authority {
    pub(crate) pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "weft test");
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    pub(crate) fn sign(&self, name: &str, groups: &[&str], server: bool) -> CertifiedKeyPem {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.subject_alt_names.push(SanType::IpAddress("127.0.0.1".parse().unwrap()));
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        for group in groups {
            params.distinguished_name.push(DnType::OrganizationName, *group);
        }
        params.extended_key_usages = vec![if server {
            ExtendedKeyUsagePurpose::ServerAuth
        } else {
            ExtendedKeyUsagePurpose::ClientAuth
        }];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        CertifiedKeyPem { certificates: certificate.pem(), key: key.serialize_pem() }
    }
}

pub(crate) struct Cluster {
    pub(crate) server: Arc<Server>,
    pub(crate) authority: Authority,
    pub(crate) url: String,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) shutdown: CancellationToken,
    pub(crate) serving: tokio::task::JoinHandle<()>,
}

pub(crate) fn base64(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(text)
}

/// The folder's store. A server that was stopped lets go of it when its last task has ended, which may be a moment later.
async fn open_store(dir: &tempfile::TempDir) -> EmbeddedStore {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        match EmbeddedStore::open(dir.path().join("store"), Options::default()) {
            Ok(store) => return store,
            Err(error) => assert!(std::time::Instant::now() < deadline, "{error:?}"),
        }
        tokio::task::yield_now().await;
    }
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        Self::start_with(tempfile::tempdir().unwrap(), |_config| {}).await
    }

    /// Starts on a folder, which may be that of a cluster before, with a configuration changed by `adapt`.
    pub(crate) async fn start_with(dir: tempfile::TempDir, adapt: impl FnOnce(&mut Config)) -> Self {
        let store = open_store(&dir).await;
        let authority = Authority::new();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut config = Config {
            advertise_address: "192.0.2.10".parse().unwrap(),
            advertise_port: address.port(),
            serving: authority.sign("apiserver", &[], true),
            client_ca: authority.pem.clone(),
            service_accounts: ServiceAccountKeys {
                signing_key: KeyPair::generate().unwrap().serialize_pem(),
                verification_keys: Vec::new(),
                issuer: "https://kubernetes.default.svc.cluster.local".into(),
                audiences: Vec::new(),
            },
            service_cidrs: vec!["10.43.0.0/16".parse().unwrap()],
            node_port_range: 30000..=32767,
            kubelet_client: Some(KubeletClient {
                identity: authority.sign("system:kube-apiserver", &[], false),
                ca: authority.pem.clone(),
            }),
            cluster_domain: "cluster.local".into(),
            max_request_bytes: DEFAULT_MAX_REQUEST_BYTES,
            event_ttl: std::time::Duration::from_secs(3600),
            compaction_interval: std::time::Duration::from_secs(300),
        };
        adapt(&mut config);
        let began = std::time::Instant::now();
        let server = Arc::new(Server::start(config, Arc::new(store)).await.unwrap());
        assert!(began.elapsed() < std::time::Duration::from_secs(5), "slow start: {:?}", began.elapsed());
        let shutdown = CancellationToken::new();
        let serving = tokio::spawn({
            let (server, shutdown) = (server.clone(), shutdown.clone());
            async move { server.serve(listener, shutdown).await.unwrap() }
        });
        let cluster = Self { server, authority, url: format!("https://{address}"), dir, shutdown, serving };
        cluster.kubeconfig("admin", &["system:masters"]);
        cluster
    }

    /// Writes a kubeconfig of a user with a client certificate.
    pub(crate) fn kubeconfig(&self, user: &str, groups: &[&str]) -> PathBuf {
        let identity = self.authority.sign(user, groups, false);
        let credentials = format!(
            "client-certificate-data: {}, client-key-data: {}",
            base64(&identity.certificates),
            base64(&identity.key)
        );
        self.write_kubeconfig(user, &credentials)
    }

    pub(crate) fn write_kubeconfig(&self, name: &str, credentials: &str) -> PathBuf {
        let path = self.dir.path().join(format!("{name}.kubeconfig"));
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
             clusters: [{{name: c, cluster: {{server: '{}', certificate-authority-data: {}}}}}]\n\
             users: [{{name: u, user: {{{credentials}}}}}]\n\
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n",
            self.url,
            base64(&self.authority.pem),
        );
        std::fs::write(&path, text).unwrap();
        path
    }

    pub(crate) fn kubectl_as(&self, user: &str, args: &[&str], stdin: Option<&str>) -> Output {
        use std::io::Write;
        let mut child = Command::new("kubectl")
            .arg("--kubeconfig")
            .arg(self.dir.path().join(format!("{user}.kubeconfig")))
            .arg("--cache-dir")
            .arg(self.dir.path().join("kube-cache"))
            .args(args)
            .stdin(if stdin.is_some() { std::process::Stdio::piped() } else { std::process::Stdio::null() })
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        if let Some(text) = stdin {
            child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        }
        child.wait_with_output().unwrap()
    }

    /// Runs kubectl as the administrator; what it printed if it succeeded.
    pub(crate) async fn kubectl(&self, args: &[&str]) -> String {
        self.kubectl_with(args, None).await
    }

    pub(crate) async fn kubectl_with(&self, args: &[&str], stdin: Option<&str>) -> String {
        // kubectl blocks this thread; the server runs on the others.
        let output = tokio::task::block_in_place(|| self.kubectl_as("admin", args, stdin));
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "kubectl {args:?}: {out}{err}");
        out.into_owned()
    }

    /// Runs kubectl that must fail; its error.
    pub(crate) async fn kubectl_fails(&self, user: &str, args: &[&str], stdin: Option<&str>) -> String {
        let output = tokio::task::block_in_place(|| self.kubectl_as(user, args, stdin));
        assert!(!output.status.success(), "kubectl {args:?}: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Stops the server; its folder.
    pub(crate) async fn stop(self) -> tempfile::TempDir {
        self.shutdown.cancel();
        self.serving.await.unwrap();
        self.server.stop().await;
        self.dir
    }
}

/// Whether kubectl is there; without it a test is skipped, or fails if it is required.
pub(crate) fn have_kubectl() -> bool {
    if Command::new("kubectl").arg("version").arg("--client").output().is_ok() {
        return true;
    }
    let required = std::env::var("WEFT_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|word| word == "kubectl"), "kubectl is required and not there");
    eprintln!("SKIP: needs kubectl");
    false
}

/// An answer.
pub(crate) struct Answer {
    pub(crate) code: u16,
    pub(crate) headers: http::HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// Code, reason and message of a failure.
    pub(crate) fn failure(&self) -> (u16, String, String) {
        let json = self.json();
        let text = |key: &str| json[key].as_str().unwrap_or_default().to_owned();
        (self.code, text("reason"), text("message"))
    }
}

/// Sends requests as one user.
pub(crate) struct Http {
    pub(crate) client: kube::Client,
}

impl Http {
    pub(crate) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Answer {
        use http_body_util::BodyExt;
        let mut request = http::Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(kube::client::Body::from(body.as_bytes().to_vec())).unwrap();
        let response = self.client.send(request).await.unwrap();
        let (head, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        Answer {
            code: head.status.as_u16(),
            headers: head.headers,
            text: String::from_utf8(bytes.to_vec()).unwrap(),
        }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], "").await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        self.send("DELETE", path, &[], "").await
    }

    pub(crate) async fn post(&self, path: &str, body: &serde_json::Value) -> Answer {
        self.send("POST", path, &[("content-type", "application/json")], &body.to_string()).await
    }

    pub(crate) async fn put(&self, path: &str, body: &serde_json::Value) -> Answer {
        self.send("PUT", path, &[("content-type", "application/json")], &body.to_string()).await
    }

    pub(crate) async fn merge(&self, path: &str, body: &serde_json::Value) -> Answer {
        self.send("PATCH", path, &[("content-type", "application/merge-patch+json")], &body.to_string()).await
    }

    /// Creates an object that must be good.
    pub(crate) async fn create(&self, path: &str, body: &serde_json::Value) -> serde_json::Value {
        let answer = self.post(path, body).await;
        assert_eq!(answer.code, 201, "{}", answer.text);
        answer.json()
    }
}

impl Cluster {
    /// Requests within the process.
    pub(crate) fn http(&self, user: &str, groups: &[&str]) -> Http {
        Http { client: self.server.client(user, groups) }
    }

    pub(crate) fn admin(&self) -> Http {
        self.http("admin", &["system:masters"])
    }

    /// Requests over TLS with the credentials of a kubeconfig.
    pub(crate) async fn https(&self, kubeconfig: &std::path::Path) -> Http {
        let file = kube::config::Kubeconfig::read_from(kubeconfig).unwrap();
        let config = kube::Config::from_custom_kubeconfig(file, &Default::default()).await.unwrap();
        Http { client: kube::Client::try_from(config).unwrap() }
    }
}
