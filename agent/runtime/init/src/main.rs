//! `weft-init <folder>`: one process per pod sandbox. It holds the pod's namespaces, is the parent of its containers,
//! writes their logs and exit codes, and serves the agent on a socket in the folder. It outlives the agent.

mod clock;
mod connection;
mod identity;
mod launch;
mod log;
mod process;
mod rootfs;
mod sandbox;
mod server;
mod sys;

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::unistd::setsid;
use weft_agent_runtime_init::wire::{self, Sandbox};

use crate::rootfs::Context;
use crate::server::Server;
use crate::sys::Fork;

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("weft-init is started by the weft agent, with a sandbox's folder");
        return ExitCode::from(2);
    };
    match run(&folder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            // The agent reads the first line; after it is gone, the file behind stderr keeps it.
            let _ = writeln!(std::io::stdout(), "error {message}");
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn run(folder: &Path) -> Result<(), String> {
    let config = fs::read(folder.join(wire::CONFIG)).context(|| "read the configuration".to_owned())?;
    let config: Sandbox = serde_json::from_slice(&config).context(|| "read the configuration".to_owned())?;
    if !matches!(launch::clone(0, config.unified.as_deref())?, Fork::Child) {
        return Ok(());
    }
    setsid().context(|| "start a session".to_owned())?;
    sys::set_name(c"weft-init").context(|| "set the name".to_owned())?;
    sys::prctl(libc::PR_SET_CHILD_SUBREAPER, 1).context(|| "adopt orphans".to_owned())?;
    sandbox::make(&config)?;
    let place = File::open(folder).context(|| format!("open {}", folder.display()))?;
    let listener = UnixListener::bind(wire::socket_path(place.as_fd())).context(|| "listen".to_owned())?;
    drop(place);
    let server = Server::new(listener).context(|| "set up the loop".to_owned())?;
    std::env::set_current_dir("/").context(|| "leave the folder".to_owned())?;
    // Now that the namespaces are made, which are not the pod's memory.
    launch::join(&config.join);
    report_ready()?;
    server.run().context(|| "serve".to_owned())
}

/// Tells the agent, and lets go of its pipe.
fn report_ready() -> Result<(), String> {
    writeln!(std::io::stdout(), "ready {}", std::process::id()).context(|| "report".to_owned())?;
    let null =
        File::options().read(true).write(true).open("/dev/null").context(|| "open /dev/null".to_owned())?;
    sys::dup_to(null.as_fd(), 1).context(|| "close stdout".to_owned())
}
