//! Kubeconfig files: how a client finds and trusts the API, and who it is.

use anyhow::Context as _;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use crate::paths::Paths;
use crate::pki::Identity;

/// A kubeconfig with one cluster, one user and one context, all named after the user.
pub(crate) fn render(server: &str, ca: &str, user: &str, identity: &Identity) -> String {
    let encode = |pem: &str| BASE64_STANDARD.encode(pem);
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: {user}@weft\n\
         clusters:\n- name: weft\n  cluster:\n    server: {server}\n    certificate-authority-data: {}\n\
         contexts:\n- name: {user}@weft\n  context:\n    cluster: weft\n    user: {user}\n\
         users:\n- name: {user}\n  user:\n    client-certificate-data: {}\n    client-key-data: {}\n",
        encode(ca),
        encode(&identity.certificate),
        encode(&identity.key),
    )
}

/// The administrator's kubeconfig of a cluster that was started once.
pub(crate) fn admin(paths: &Paths) -> anyhow::Result<String> {
    let path = paths.admin_kubeconfig();
    std::fs::read_to_string(&path)
        .with_context(|| format!("there is no cluster in {}; start one with `weft up`", paths.data.display()))
}
