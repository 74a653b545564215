//! To come.

use anyhow::Result;
use clap::Args;
use oscontainer_program::options::Global;

#[derive(Debug, Clone, Args)]
pub struct FlattenArgs {}

pub fn main(_args: FlattenArgs, _global: &Global) -> Result<()> {
    anyhow::bail!("to come")
}
