//! `weft`: the command line for administrators, and the wiring of every role.

mod agent;
mod artifacts;
mod cli;
mod cluster;
mod down;
mod image;
mod kubeconfig;
mod lock;
mod logging;
mod net;
mod network;
mod nodes;
mod paths;
mod pki;
mod pod_routes;
mod proxy;
mod ranges;
mod server;
mod up;
mod ways;

use std::process::ExitCode;

use clap::Parser as _;

use crate::cli::{Cli, Command};
use crate::paths::Paths;

/// What `weft version` and the API say.
pub(crate) const VERSION: &str = concat!("v1.36.2+weft-", env!("CARGO_PKG_VERSION"));

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stdout, reason = "this is the command line's output")]
fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let paths = Paths::new(&cli.data_dir);
    match cli.command {
        Command::Why(args) => return Ok(net::why(&paths, &args)),
        Command::Flows(args) => return Ok(net::flows(&paths, &args)),
        Command::Policy(command) => return Ok(net::policy(&paths, &command)),
        Command::Net(command) => return Ok(net::net(&paths, &command)),
        Command::Doctor(args) => return Ok(net::doctor(&paths, &args)),
        Command::Service(command) => return Ok(net::service(&paths, &command)),
        Command::Up(args) => up::up(&paths, &args, &cli.log)?,
        Command::Down(args) => down::down(&paths, args.purge)?,
        Command::Server(args) => server::command(&paths, &args, &cli.log)?,
        Command::Agent(args) => agent::command(&paths, &args, &cli.log)?,
        Command::Proxy(args) => proxy::command(&args, &cli.log)?,
        Command::Image(command) => image::run(&paths, &command)?,
        Command::Kubeconfig => {
            print!("{}", kubeconfig::admin(&paths)?);
        }
        Command::Version => {
            println!("weft {VERSION}");
        }
    }
    Ok(ExitCode::SUCCESS)
}
