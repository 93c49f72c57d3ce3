//! What is fuzzed: decisions on packets, and every parser that reads what others wrote.
//!
//! A target takes any bytes and panics if something that must hold does not. `cargo test` runs each over its corpus
//! (`corpus/<name>`) and some thousand inputs made from it, the same every time; `cargo xtask fuzz` runs them by libFuzzer, whose
//! inputs are led by the code that they reach. An input that found a mistake goes to the corpus.
#![forbid(unsafe_code)]

mod api;
mod dns;
mod images;
mod input;
mod logs;
mod mutate;
mod netlink;
mod packets;
mod plugin;
mod policy;
mod services;

use std::path::PathBuf;

pub use mutate::Mutations;

/// Something to fuzz.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Name, also of the corpus' folder.
    pub name: &'static str,
    /// Takes any bytes; panics if something is wrong.
    pub run: fn(&[u8]),
    /// How many made inputs a plain test tries.
    pub tries: usize,
}

const fn target(name: &'static str, run: fn(&[u8]), tries: usize) -> Target {
    Target { name, run, tries }
}

/// All targets.
pub const TARGETS: &[Target] = &[
    target("packet_bytes", packets::bytes, 20_000),
    target("packet_built", packets::built, 20_000),
    target("packet_answer", packets::answer, 10_000),
    target("policy_verdict", policy::verdict, 5_000),
    target("policy_objects", policy::objects, 2_000),
    target("service_steps", services::steps, 600),
    target("service_objects", services::objects, 2_000),
    target("service_feed", services::feed, 10_000),
    target("arp_frame", netlink::arp, 10_000),
    target("ndp_message", netlink::ndp, 10_000),
    target("netlink_reply", netlink::reply, 5_000),
    target("cni_config", plugin::config, 5_000),
    target("cni_call", plugin::call, 5_000),
    target("api_json", api::json, 2_000),
    target("api_yaml", api::yaml, 2_000),
    target("api_protobuf", api::protobuf, 5_000),
    target("api_patch", api::patch, 2_000),
    target("api_selector", api::selector, 10_000),
    target("api_text", api::text, 10_000),
    target("api_request", api::request, 10_000),
    target("dns_query", dns::query, 5_000),
    target("image_archive", images::archive, 300),
    target("image_layer", images::layer, 300),
    target("image_reference", images::reference, 10_000),
    target("log_line", logs::line, 10_000),
];

/// The target of a name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

impl Target {
    /// Where its committed inputs are.
    #[must_use]
    pub fn corpus(&self) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus").join(self.name)
    }

    /// Its committed inputs.
    ///
    /// # Errors
    /// If the folder can't be read.
    pub fn seeds(&self) -> std::io::Result<Vec<Vec<u8>>> {
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(self.corpus())? {
            paths.push(entry?.path());
        }
        paths.sort();
        paths.into_iter().map(std::fs::read).collect()
    }
}
