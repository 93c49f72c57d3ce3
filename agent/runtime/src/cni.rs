//! The caller's side of CNI 1.1: reads the network configuration, executes its plugins, keeps what DEL needs.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::SandboxSpec;

/// The interface in the pod.
const IFNAME: &str = "eth0";
/// No plugin needs longer; one that hangs must not hold its pod for ever.
const TIMEOUT: Duration = Duration::from_secs(60);
/// More than any configuration has.
const MAX_PLUGINS: usize = 32;

/// Why the network of a pod could not be set up or torn down.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum NetworkError {
    /// No configuration is there (yet).
    #[error("cni plugin not initialized: no network config found in {0:?}")]
    NotConfigured(PathBuf),
    /// A configuration is broken.
    #[error("network config {path:?}: {reason}")]
    Config {
        /// File.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A plugin is in none of the folders.
    #[error("failed to find plugin {plugin:?} in path {folders:?}")]
    Missing {
        /// Its type.
        plugin: String,
        /// Where it was looked for.
        folders: Vec<PathBuf>,
    },
    /// A plugin said no.
    #[error("plugin type={plugin:?} failed ({command}): {message}")]
    Plugin {
        /// Its type.
        plugin: String,
        /// `add`, `del`, `check`, `gc` or `status`.
        command: &'static str,
        /// CNI error code; 0 if it gave none.
        code: u64,
        /// What it said.
        message: String,
    },
    /// A plugin did not end in time and was killed.
    #[error("plugin type={plugin:?} did not end within {} s", TIMEOUT.as_secs())]
    Timeout {
        /// Its type.
        plugin: String,
    },
    /// The kernel refused.
    #[error("cannot {op} {path:?}")]
    Io {
        /// What was being done.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A network configuration list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ConfigList {
    #[serde(default = "oldest")]
    cni_version: String,
    name: String,
    #[serde(default)]
    disable_check: bool,
    #[serde(default, rename = "disableGC")]
    disable_gc: bool,
    plugins: Vec<Map<String, Value>>,
}

fn oldest() -> String {
    "0.1.0".to_owned()
}

/// A pod's place in a network: kept on disk from before ADD until after DEL.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Attachment {
    /// Sandbox id.
    pub(crate) container: String,
    /// Path to the network namespace.
    pub(crate) netns: PathBuf,
    /// `CNI_ARGS`.
    pub(crate) args: BTreeMap<String, String>,
    /// What plugins that name such a capability get as `runtimeConfig`.
    #[serde(default)]
    capabilities: Map<String, Value>,
    config: ConfigList,
    /// Result of ADD once there is one.
    result: Option<Value>,
}

/// Executes plugins.
#[derive(Clone, Debug)]
pub(crate) struct Network {
    pub(crate) bin_folders: Vec<PathBuf>,
    pub(crate) config_folder: PathBuf,
}

#[derive(Clone, Copy)]
enum Verb {
    Add,
    Del,
    Check,
    Gc,
    Status,
}

impl Verb {
    fn name(self) -> (&'static str, &'static str) {
        match self {
            Self::Add => ("ADD", "add"),
            Self::Del => ("DEL", "del"),
            Self::Check => ("CHECK", "check"),
            Self::Gc => ("GC", "gc"),
            Self::Status => ("STATUS", "status"),
        }
    }
}

impl Network {
    /// The first valid configuration of the folder in the order of names, as other runtimes choose it.
    pub(crate) fn config(&self) -> Result<ConfigList, NetworkError> {
        let folder = &self.config_folder;
        let missing = || NetworkError::NotConfigured(folder.clone());
        let mut files: Vec<PathBuf> =
            fs::read_dir(folder).map_err(|_absent| missing())?.flatten().map(|entry| entry.path()).collect();
        files.retain(|path| path.extension().is_some_and(|e| e == "conflist" || e == "conf" || e == "json"));
        files.sort();
        let mut first_error = None;
        for path in files {
            match load(&path) {
                Ok(config) => return Ok(config),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "skipping a broken network config");
                    first_error.get_or_insert(error);
                }
            }
        }
        Err(first_error.unwrap_or_else(missing))
    }

    pub(crate) fn prepare(
        &self,
        container: &str,
        netns: &Path,
        args: BTreeMap<String, String>,
        capabilities: Map<String, Value>,
    ) -> Result<Attachment, NetworkError> {
        let config = self.config()?;
        Ok(Attachment {
            container: container.to_owned(),
            netns: netns.to_path_buf(),
            args,
            capabilities,
            config,
            result: None,
        })
    }

    /// ADD of every plugin in order. The result is kept in the attachment.
    pub(crate) async fn add(&self, attachment: &mut Attachment) -> Result<Vec<IpAddr>, NetworkError> {
        let mut result = None;
        for plugin in &attachment.config.plugins {
            let output = self.execute(Verb::Add, plugin, attachment, result.take()).await?;
            result = Some(output);
        }
        attachment.result = result;
        Ok(attachment.ips())
    }

    /// DEL of every plugin in reverse order (CNI 1.1.0 §4). All are called, whatever the others say.
    pub(crate) async fn delete(&self, attachment: &Attachment) -> Result<(), NetworkError> {
        let mut first_error = None;
        for plugin in attachment.config.plugins.iter().rev() {
            let result = self.execute(Verb::Del, plugin, attachment, attachment.result.clone()).await;
            if let Err(error) = result {
                first_error.get_or_insert(error);
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    /// CHECK of every plugin in order.
    pub(crate) async fn check(&self, attachment: &Attachment) -> Result<(), NetworkError> {
        if attachment.config.disable_check || version(&attachment.config.cni_version) < (0, 4) {
            return Ok(());
        }
        for plugin in &attachment.config.plugins {
            self.execute(Verb::Check, plugin, attachment, attachment.result.clone()).await?;
        }
        Ok(())
    }

    /// Tells every plugin what is still attached; what else it holds, it gives up.
    pub(crate) async fn collect_garbage(&self, valid: &[String]) -> Result<(), NetworkError> {
        let config = self.config()?;
        if config.disable_gc || version(&config.cni_version) < (1, 1) {
            return Ok(());
        }
        let valid: Vec<Value> = valid.iter().map(|id| json!({"containerID": id, "ifname": IFNAME})).collect();
        let attachment = Attachment::nowhere(config);
        for plugin in &attachment.config.plugins {
            let mut plugin = plugin.clone();
            plugin.insert("cni.dev/valid-attachments".to_owned(), Value::from(valid.clone()));
            self.execute(Verb::Gc, &plugin, &attachment, None).await?;
        }
        Ok(())
    }

    /// Whether every plugin can serve an ADD now.
    pub(crate) async fn status(&self) -> Result<(), NetworkError> {
        let attachment = Attachment::nowhere(self.config()?);
        for plugin in &attachment.config.plugins {
            self.find(plugin)?;
            if version(&attachment.config.cni_version) >= (1, 1) {
                self.execute(Verb::Status, plugin, &attachment, None).await?;
            }
        }
        Ok(())
    }

    fn find(&self, plugin: &Map<String, Value>) -> Result<(String, PathBuf), NetworkError> {
        let kind = plugin.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
        let missing = || NetworkError::Missing { plugin: kind.clone(), folders: self.bin_folders.clone() };
        if kind.is_empty() || kind.contains('/') {
            return Err(missing());
        }
        let path = self.bin_folders.iter().map(|folder| folder.join(&kind)).find(|path| path.is_file());
        path.map(|path| (kind.clone(), path)).ok_or_else(missing)
    }

    async fn execute(
        &self,
        verb: Verb,
        plugin: &Map<String, Value>,
        attachment: &Attachment,
        previous: Option<Value>,
    ) -> Result<Value, NetworkError> {
        let (kind, path) = self.find(plugin)?;
        let io_error = |op| {
            let path = path.clone();
            move |source| NetworkError::Io { op, path, source }
        };
        let input = attachment.config.input(plugin, &attachment.capabilities, previous);
        let mut command = Command::new(&path);
        let folders: Vec<String> =
            self.bin_folders.iter().map(|folder| folder.display().to_string()).collect();
        command.env("CNI_COMMAND", verb.name().0).env("CNI_PATH", folders.join(":"));
        if matches!(verb, Verb::Add | Verb::Del | Verb::Check) {
            command.env("CNI_CONTAINERID", &attachment.container).env("CNI_NETNS", &attachment.netns);
            command.env("CNI_IFNAME", IFNAME).env("CNI_ARGS", attachment.arguments());
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().map_err(io_error("execute"))?;
        let stdin = child.stdin.take();
        let feed = async {
            if let Some(mut stdin) = stdin {
                // A plugin may end without reading all; its exit says how it fared.
                let _ = stdin.write_all(input.to_string().as_bytes()).await;
            }
        };
        let run = async { tokio::join!(feed, child.wait_with_output()).1 };
        let output = tokio::time::timeout(TIMEOUT, run)
            .await
            .map_err(|_elapsed| NetworkError::Timeout { plugin: kind.clone() })?
            .map_err(io_error("wait for"))?;
        if output.status.success() {
            return Ok(serde_json::from_slice(&output.stdout).unwrap_or(Value::Null));
        }
        Err(refusal(kind, verb, &output))
    }
}

fn refusal(plugin: String, verb: Verb, output: &std::process::Output) -> NetworkError {
    let said: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let text = |key: &str| said.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (mut message, details) = (text("msg"), text("details"));
    if message.is_empty() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        message = format!("netplugin failed with no error message ({}): {}", output.status, stderr.trim());
    } else if !details.is_empty() {
        message = format!("{message}; {details}");
    }
    let code = said.get("code").and_then(Value::as_u64).unwrap_or(0);
    NetworkError::Plugin { plugin, command: verb.name().1, code, message }
}

impl ConfigList {
    fn input(
        &self,
        plugin: &Map<String, Value>,
        offered: &Map<String, Value>,
        previous: Option<Value>,
    ) -> Value {
        let mut input = plugin.clone();
        // The list says which capabilities a plugin has; of these it gets what there is (CNI 1.1.0 §3).
        let named = input.remove("capabilities");
        let has = |name: &str| named.as_ref().and_then(|named| named.get(name)).is_some_and(|on| *on == true);
        let given = offered.iter().filter(|(name, _)| has(name.as_str()));
        let given: Map<String, Value> = given.map(|(name, value)| (name.clone(), value.clone())).collect();
        if !given.is_empty() {
            input.insert("runtimeConfig".to_owned(), Value::Object(given));
        }
        input.insert("cniVersion".to_owned(), Value::from(self.cni_version.clone()));
        input.insert("name".to_owned(), Value::from(self.name.clone()));
        if let Some(previous) = previous {
            input.insert("prevResult".to_owned(), previous);
        }
        Value::Object(input)
    }
}

impl Attachment {
    fn nowhere(config: ConfigList) -> Self {
        Self {
            container: String::new(),
            netns: PathBuf::new(),
            args: BTreeMap::new(),
            capabilities: Map::new(),
            config,
            result: None,
        }
    }

    fn arguments(&self) -> String {
        let pairs: Vec<String> = self.args.iter().map(|(key, value)| format!("{key}={value}")).collect();
        pairs.join(";")
    }

    /// Addresses in the result, without their prefix lengths.
    pub(crate) fn ips(&self) -> Vec<IpAddr> {
        let ips = self.result.as_ref().and_then(|result| result.get("ips")).and_then(Value::as_array);
        let address = |ip: &Value| ip.get("address")?.as_str()?.split('/').next()?.parse().ok();
        ips.into_iter().flatten().filter_map(address).collect()
    }
}

/// A sandbox's capability arguments, by CNI's conventional names; what isn't asked for is left out.
pub(crate) fn capabilities(spec: &SandboxSpec) -> Map<String, Value> {
    let mut all = Map::new();
    if !spec.port_mappings.is_empty() {
        all.insert("portMappings".to_owned(), json!(spec.port_mappings));
    }
    let mut bounds = Map::new();
    let asked = spec.bandwidth;
    for (name, bound) in
        [("ingressRate", asked.ingress_bits_per_second), ("egressRate", asked.egress_bits_per_second)]
    {
        bounds.extend(bound.map(|bound| (name.to_owned(), json!(bound))));
    }
    if !bounds.is_empty() {
        all.insert("bandwidth".to_owned(), Value::Object(bounds));
    }
    all
}

fn load(path: &Path) -> Result<ConfigList, NetworkError> {
    let broken = |reason: String| NetworkError::Config { path: path.to_path_buf(), reason };
    let text =
        fs::read(path).map_err(|source| NetworkError::Io { op: "read", path: path.to_path_buf(), source })?;
    let value: Value = serde_json::from_slice(&text).map_err(|error| broken(error.to_string()))?;
    let list = if value.get("plugins").is_some() {
        value
    } else {
        json!({"cniVersion": value.get("cniVersion").cloned().unwrap_or_else(|| oldest().into()),
               "name": value.get("name").cloned().unwrap_or_default(), "plugins": [value]})
    };
    let config: ConfigList = serde_json::from_value(list).map_err(|error| broken(error.to_string()))?;
    let typed = |plugin: &Map<String, Value>| {
        plugin.get("type").and_then(Value::as_str).is_some_and(|kind| !kind.is_empty())
    };
    if config.plugins.is_empty() || config.plugins.len() > MAX_PLUGINS || !config.plugins.iter().all(typed) {
        return Err(broken("no plugins, too many, or one without a type".to_owned()));
    }
    if config.name.is_empty() {
        return Err(broken("it has no name".to_owned()));
    }
    Ok(config)
}

/// Major and minor.
fn version(text: &str) -> (u32, u32) {
    let mut parts = text.split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}
