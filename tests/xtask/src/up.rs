//! `cargo xtask up`: from a fresh machine to a cluster with a sample application, and back.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::steps::{quiet, root, step};
use crate::{artifacts, images, machine};

const DATA_DIR: &str = "/var/lib/weft";
const SAMPLE: &str = "docs/samples/hello.yaml";

/// Installs, builds, starts, applies the sample, and says what to try next.
pub(crate) fn up() -> anyhow::Result<()> {
    machine::check()?;
    machine::install_for_up()?;
    let weft = artifacts::build_all(true)?;
    let archives = images::build_all()?;
    step("start the cluster", || quiet(Command::new(&weft).args(["up", "--detach"])).map(|_| ()))?;
    step("import the sample images", || import(&weft, &archives))?;
    let sample = root().join(SAMPLE);
    step("apply the sample application", || {
        quiet(kubectl().arg("apply").arg("-f").arg(&sample))?;
        quiet(kubectl().args(["rollout", "status", "deployment/hello", "--timeout=120s"])).map(|_| ())
    })?;
    let address =
        quiet(kubectl().args(["get", "nodes", "-o", "jsonpath={.items[0].status.addresses[0].address}"]))?;
    summary(&weft, address.trim());
    Ok(())
}

fn import(weft: &Path, archives: &[PathBuf]) -> anyhow::Result<()> {
    for archive in archives {
        quiet(Command::new(weft).args(["image", "import"]).arg(archive))?;
    }
    Ok(())
}

fn kubectl() -> Command {
    let mut command = Command::new("kubectl");
    command.env("KUBECONFIG", format!("{DATA_DIR}/admin.kubeconfig"));
    command
}

fn summary(weft: &Path, address: &str) {
    eprintln!(
        "\nweft is up, and nginx answers behind a Service:\n\n\
         \x20 curl http://{address}:30080/\n\n\
         The kubeconfig is {DATA_DIR}/admin.kubeconfig. Next:\n\n\
         \x20 export KUBECONFIG={DATA_DIR}/admin.kubeconfig\n\
         \x20 kubectl get pods -o wide\n\
         \x20 kubectl scale deployment/hello --replicas=10\n\
         \x20 kubectl exec -it deploy/hello -- sh\n\n\
         `cargo xtask down` removes it all; {} is the binary.",
        weft.display()
    );
}

/// Removes the cluster with its data.
pub(crate) fn down() -> anyhow::Result<()> {
    machine::check()?;
    let weft = crate::steps::target("artifacts")?.join("weft");
    anyhow::ensure!(weft.is_file(), "there is no {}; nothing was built, so nothing runs", weft.display());
    step("remove the cluster", || quiet(Command::new(&weft).args(["down", "--purge"])).map(|_| ()))
}
