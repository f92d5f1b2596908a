"""Sphinx configuration of the site: `make docs` runs pages.py and then Sphinx, which writes docs/_build/html.

The build executes no notebooks, and the pages load no external files.
"""

from functools import cache

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.search.en import SearchEnglish

project = "modelfactory"
extensions = ["myst_nb"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_code_prompt_show = nb_code_prompt_hide = "source"
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
html_math_renderer = "mathml"
nitpicky = True
html_theme = "furo"
html_title = "modelfactory"
html_copy_source = html_show_sphinx = html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = dict(navigation_with_keys=True)


class Search(SearchEnglish):
    "Finds the stem of each word once, not once per occurrence."

    stem = cache(SearchEnglish.stem)


def setup(app):
    "Renders formulas as MathML, which browsers display without loading MathJax."
    app.add_search_language(Search)

    def draw(display):
        def visit(self, node):
            self.body.append(f"<span class='formula {display}'>{convert(node.astext(), display=display)}</span>")
            raise SkipNode

        return visit, None

    app.add_html_math_renderer("mathml", draw("inline"), draw("block"))
