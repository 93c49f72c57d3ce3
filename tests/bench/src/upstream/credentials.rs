//! Who is who in upstream's cluster: an authority, the API server's certificate, the key of service accounts, a token and a kubeconfig
//! for each program.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};

use super::place::ADDRESS;

/// The files, all in one folder.
pub(super) struct Credentials {
    folder: PathBuf,
    /// The node's name.
    pub(super) node: String,
}

impl Credentials {
    /// Makes them all.
    pub(super) fn new(data: &Path, node: &str) -> anyhow::Result<Self> {
        let credentials = Self { folder: data.join("credentials"), node: node.to_owned() };
        fs::create_dir_all(&credentials.folder)?;
        credentials.certificates().context("make certificates")?;
        credentials.tokens()?;
        Ok(credentials)
    }

    /// One of the files: `ca.crt`, `server.crt`, `server.key`, `accounts.key`, `accounts.pub`, `tokens.csv`.
    pub(super) fn file(&self, name: &str) -> String {
        self.folder.join(name).to_string_lossy().into_owned()
    }

    /// The kubeconfig of `admin` or of a program.
    pub(super) fn kubeconfig(&self, whose: &str) -> String {
        self.file(&format!("{whose}.kubeconfig"))
    }

    fn certificates(&self) -> anyhow::Result<()> {
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        authority.distinguished_name.push(DnType::CommonName, "upstream");
        let key = KeyPair::generate()?;
        fs::write(self.file("ca.crt"), authority.self_signed(&key)?.pem())?;
        let issuer = Issuer::new(authority, key);
        let names = [
            "localhost",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "127.0.0.1",
            ADDRESS,
            "10.43.0.1",
        ];
        let mut server = CertificateParams::new(names.map(str::to_owned))?;
        server.distinguished_name.push(DnType::CommonName, "kube-apiserver");
        let key = KeyPair::generate()?;
        fs::write(self.file("server.crt"), server.signed_by(&key, &issuer)?.pem())?;
        fs::write(self.file("server.key"), key.serialize_pem())?;
        let accounts = KeyPair::generate()?;
        fs::write(self.file("accounts.key"), accounts.serialize_pem())?;
        fs::write(self.file("accounts.pub"), accounts.public_key_pem())?;
        Ok(())
    }

    fn tokens(&self) -> anyhow::Result<()> {
        let node = format!("system:node:{}", self.node);
        let whose = [
            ("admin", "admin", "system:masters"),
            ("kubelet", node.as_str(), "system:nodes"),
            ("kube-controller-manager", "system:kube-controller-manager", ""),
            ("kube-scheduler", "system:kube-scheduler", ""),
            ("kube-proxy", "system:kube-proxy", ""),
        ];
        let mut tokens = String::new();
        for (program, user, group) in whose {
            let token = fs::read_to_string("/proc/sys/kernel/random/uuid").context("make a token")?;
            let token = token.trim();
            let _ = writeln!(tokens, "{token},{user},{user},\"{group}\"");
            fs::write(self.kubeconfig(program), kubeconfig(&self.file("ca.crt"), token))?;
        }
        fs::write(self.file("tokens.csv"), tokens).context("write the tokens")
    }
}

fn kubeconfig(authority: &str, token: &str) -> String {
    format!(
        "apiVersion: v1
kind: Config
clusters:
- name: c
  cluster: {{server: \"https://127.0.0.1:6443\", certificate-authority: \"{authority}\"}}
users:
- name: u
  user: {{token: \"{token}\"}}
contexts:
- name: c
  context: {{cluster: c, user: u}}
current-context: c
"
    )
}
