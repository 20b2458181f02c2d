"""HTML reports: `report.html` of a run or curriculum, and a comparison of several. See README.md in this folder."""
